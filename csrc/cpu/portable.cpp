#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define IGPT_SET portable
#define IGPT_RECORD kPortable
#define IGPT_LANES 4
#define IGPT_INTRINSICS "portable.inc"
#include "set.inc"
