#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define IGPT_INTRINSICS "portable.inc"

namespace igpt::cpu {
namespace portable {
namespace {

constexpr int kLanes = 4;

#include "vector.inc"
//
#include "decode.inc"
#include "loss.inc"

}  // namespace
}  // namespace portable

const Kernels kPortable{"portable", portable::loss_rows, portable::decode_part, portable::decode_finish};

}  // namespace igpt::cpu
