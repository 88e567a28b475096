// Chooses the instruction set once. Compiled at the baseline, so it runs on any processor.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace bise {

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

const Ops& by_name(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512")) return ops_avx512;
  if (!std::strcmp(name, "avx2")) return ops_avx2;
#endif
  (void)name;
  return ops_scalar;
}

}  // namespace

const char* detected_isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  if (has_avx512()) return "avx512 avx2 scalar";
  if (has_avx2()) return "avx2 scalar";
  return "scalar";
}

const Ops& chosen_ops() {
  const std::string detected = detected_isas();
  const char* forced = std::getenv("BISE_ISA");
  if (!forced || !*forced) return by_name(detected.substr(0, detected.find(' ')).c_str());
  const std::string padded = " " + detected + " ";
  if (padded.find(" " + std::string(forced) + " ") == std::string::npos)
    throw std::runtime_error("BISE_ISA=" + std::string(forced) + " cannot run here; this processor offers: " + detected);
  return by_name(forced);
}

}  // namespace bise
