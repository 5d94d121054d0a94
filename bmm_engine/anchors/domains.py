"""What parameters may be that several rules have: the types of their signatures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1)]
# Which sign is elected where task vectors disagree: that of their sum, or that which more of them have.
Elect = Literal["sum", "count"]
# How DARE and DELLA make up for what they drop: by the probability, by the tensor's L1 norm, or not at all.
Rescale = Literal["inverse", "l1", "none"]
