// float8 rows: e4m3 values and one scale for every 128 channels, the same bits on every device.
//
// Scales follow DeepEP's low-latency dispatch: amax is at least 1e-4, value = e4m3 * scale.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr float kMaxE4M3 = 448.0f;
constexpr float kMinAmax = 1e-4f;

struct Scale {
  float scale;    // what the experts multiply by
  float inverse;  // what the row is multiplied by before it is rounded
};

EP_HOST_DEVICE inline uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}
EP_HOST_DEVICE inline float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// `amax`: largest magnitude of the channels, NaN left out.
EP_HOST_DEVICE inline float clamped_amax(float amax) { return amax >= kMinAmax ? amax : kMinAmax; }

// From both quotients of the clamped amax, as IEEE divides: compile device code without fast math.
EP_HOST_DEVICE inline Scale scale_of(float amax_by_max, float max_by_amax, ScaleFormat format) {
  if (format == ScaleFormat::kFloat32) return {amax_by_max, max_by_amax};
  const uint32_t bits = bits_of(amax_by_max);
  uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0 ? 1 : 0);
  if (exponent > 253) exponent = 253;  // an infinite amax
  return {float_of(exponent << 23), float_of((254 - exponent) << 23)};
}
EP_HOST_DEVICE inline Scale scale_for(float amax, ScaleFormat format) {
  amax = clamped_amax(amax);
  return scale_of(amax / kMaxE4M3, kMaxE4M3 / amax, format);
}

// The exponent byte of a power of two.
EP_HOST_DEVICE inline uint8_t ue8m0_of(float scale) {
  return static_cast<uint8_t>(bits_of(scale) >> 23);
}

// Round to nearest even; beyond 448 becomes 448, NaN becomes 0x7f: what cvt.rn.satfinite does.
EP_HOST_DEVICE inline uint8_t to_e4m3(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint8_t>(bits >> 31 << 7);
  if (magnitude > 0x7f800000) return 0x7f;
  if (magnitude >= 0x43e00000) return sign | 0x7e;  // 448 and more
  if (magnitude < 0x3c800000) {                     // below 2^-6: multiples of 2^-9
    // Adding 2^14 leaves exactly the multiples of 2^-9, rounded to nearest even.
    const float shifted = float_of(magnitude) + 16384.0f;
    return sign | static_cast<uint8_t>(bits_of(shifted) - bits_of(16384.0f));
  }
  // Three bits of mantissa stay: round the 20 below them, then move the exponent's bias 127 to 7.
  const uint32_t rounded = magnitude + 0x7ffff + ((magnitude >> 20) & 1);
  const uint32_t value8 = (rounded >> 20) - ((127 - 7) << 3);
  return sign | static_cast<uint8_t>(value8 > 0x7e ? 0x7e : value8);
}

// What an e4m3 number stands for, exactly; 0x7f and 0xff are NaN.
EP_HOST_DEVICE inline float from_e4m3(uint8_t value) {
  const uint32_t magnitude = value & 0x7f;
  // The exponent's bias 7 becomes 127. Below 2^-6 the mantissa counts multiples of 2^-9: behind the
  // bits of 2^-6 it is that much too much.
  const uint32_t normal = (magnitude << 20) + ((127 - 7) << 23);
  const float subnormal = float_of(normal + (1 << 23)) - 0.015625f;
  const uint32_t finite = magnitude < 8 ? bits_of(subnormal) : normal;
  return float_of((magnitude == 0x7f ? 0x7fc00000 : finite) | uint32_t{value} >> 7 << 31);
}

EP_HOST_DEVICE inline uint32_t scales_for(uint32_t hidden) { return (hidden + 127) / 128; }

}  // namespace ep::protocol
