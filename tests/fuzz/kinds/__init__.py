"""The seven kinds of input. Each makes a case: files in a folder of its own, one of them mutated, a command, and its judge."""

from tests.fuzz.kinds.adapters import make_adapter_case
from tests.fuzz.kinds.calibration import make_calibration_case
from tests.fuzz.kinds.configs import make_config_case
from tests.fuzz.kinds.indexes import make_index_case
from tests.fuzz.kinds.measured import make_measured_case
from tests.fuzz.kinds.recipes import make_recipe_case
from tests.fuzz.kinds.weights import make_weights_case

KINDS = {
    "weights": make_weights_case,
    "indexes": make_index_case,
    "configs": make_config_case,
    "adapters": make_adapter_case,
    "measured": make_measured_case,
    "recipes": make_recipe_case,
    "calibration": make_calibration_case,
}
