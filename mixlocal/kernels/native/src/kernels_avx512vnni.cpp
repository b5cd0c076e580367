// AVX-512 with VNNI (Ice Lake, Zen 4 and later): four products of bytes a lane in one instruction.
#define MIXLOCAL_VNNI
#include "kernels_avx512.cpp"
