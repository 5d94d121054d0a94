#pragma once

#include <type_traits>

namespace bmm {

// What an instruction set brings for sums of type T, of what it brings for float (`f32`) and for double (`f64`).
template <class T, class Both>
const auto& by_type(const Both& both) {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    if constexpr (std::is_same_v<T, float>) {
        return both.f32;
    } else {
        return both.f64;
    }
}

}  // namespace bmm
