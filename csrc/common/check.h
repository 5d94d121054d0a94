#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace bmm {

// Thrown by every failed check; what() starts with file:line and ends with the values that clash.
class Error : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
    std::ostringstream message;
    message << file << ':' << line << ": ";
    (message << ... << parts);
    throw Error(message.str());
}

}  // namespace bmm

#define BMM_CHECK(condition, ...)                                                                    \
    do {                                                                                             \
        if (!(condition)) bmm::fail(__FILE__, __LINE__, "expected ", #condition, ": ", __VA_ARGS__); \
    } while (false)
