// The version of core's device headers, which is that of the package deep-ep-core.
//
// Headers of another package are compiled on the user's machine against whatever core is installed there. They hold
//     static_assert(deep_ep_core::headers_fit(0, 1), "deep-ep-core 0.1 is needed");
// so that a wrong pair of packages is one sentence, and not a page of template errors.
#pragma once

namespace deep_ep_core {

inline constexpr int kMajorVersion = 0;
inline constexpr int kMinorVersion = 1;
inline constexpr int kPatchVersion = 0;

// Whether these headers serve code that was written for version `for_major.for_minor`. Below 1.0 each minor version may
// break what the one before it offered.
constexpr bool headers_fit(int for_major, int for_minor) {
    if (for_major != kMajorVersion) return false;
    return kMajorVersion == 0 ? for_minor == kMinorVersion : for_minor <= kMinorVersion;
}

}  // namespace deep_ep_core
