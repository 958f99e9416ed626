// registry.cpp: every kernel by its name. One translation unit for all, as NVRTC compiles them. build.rs compiles this
// file twice: plain, and with EMU_CHECKED, where the compiler reports every access; the namespace keeps them apart.
#include "runtime.h"

#include <utility>

#ifdef EMU_CHECKED
#define EMU_SIDE checked_side
#define EMU_TABLE emu_checked
#else
#define EMU_SIDE plain_side
#define EMU_TABLE emu_plain
#endif

namespace EMU_SIDE {
#include "../cuda/src/gpu.h"

#include "../cuda/src/elementwise.cu"
#include "../cuda/src/norm.cu"
#include "../cuda/src/rope.cu"
#include "../cuda/src/rope_append.cu"
#include "../cuda/src/score.cu"
#include "../cuda/src/sample.cu"
#include "../cuda/src/embed.cu"
#include "../cuda/src/attention.cu"
#include "../cuda/src/attention_decode.cu"
#include "../cuda/src/attention_decode_half.cu"
#include "../cuda/src/attention_half.cu"
#include "../cuda/src/linear_gemv.cu"
#include "../cuda/src/linear_gemm.cu"
#include "../cuda/src/linear_narrow.cu"
#include "../cuda/src/linear_wide.cu"
#include "../cuda/src/linear_w8a8.cu"
#include "../cuda/src/hessian.cu"
#include "../cuda/src/hessian_wide.cu"
#include "../cuda/src/random.cu"
#include "../cuda/src/reproducible.cu"
#include "../cuda/src/reproducible_attention.cu"
#include "../cuda/src/solve_factor.cu"
#include "../cuda/src/solve_gptq.cu"
#include "../cuda/src/input.cu"

#include "planted.cu"

// The argument's kind, and its value from the launch's list.
template <class A> struct Read;
template <class T> struct Read<T*> {
  static const char kind = 'p';
  static T* from(const emu::Arg& a) { return reinterpret_cast<T*>(a.value); }
};
template <> struct Read<int> {
  static const char kind = 'i';
  static int from(const emu::Arg& a) { return (int)a.value; }
};
template <> struct Read<u32> {
  static const char kind = 'i';
  static u32 from(const emu::Arg& a) { return (u32)a.value; }
};
template <> struct Read<float> {
  static const char kind = 'f';
  static float from(const emu::Arg& a) { return __uint_as_float((u32)a.value); }
};

template <class F> struct Call;
template <class... A> struct Call<void (*)(A...)> {
  static constexpr char signature[sizeof...(A) + 1] = {Read<A>::kind..., 0};
  template <void (*kernel)(A...), size_t... I>
  __attribute__((no_sanitize("thread"))) static void spread(const emu::Arg* args, std::index_sequence<I...>) {
    kernel(Read<A>::from(args[I])...);
  }
  template <void (*kernel)(A...)> static void enter(const emu::Arg* args) {
    spread<kernel>(args, std::index_sequence_for<A...>{});
  }
};
}  // namespace EMU_SIDE

#define CALL(name) EMU_SIDE::Call<decltype(&EMU_SIDE::name)>
#define K(name) {#name, CALL(name)::signature, CALL(name)::enter<EMU_SIDE::name>}
// clang-format off
const emu::Kernel EMU_TABLE[] = {
    K(rms_norm), K(add_rms_norm),
    K(activation_mul), K(add_assign), K(soft_cap), K(gather_rows), K(slice_columns), K(abs_max),
    K(embed_dense), K(embed_packed),
    K(rope), K(kv_append), K(kv_append_half), K(rope_append), K(rope_append_half),
    K(attention_prefill), K(attention_decode), K(attention_decode_wide), K(attention_decode_half_64), K(attention_decode_half_128),
    K(attention_half_64), K(attention_half_128),
    K(score), K(argmax), K(draw_tokens),
    K(gemv_dense), K(gemv_w4), K(gemv_w8), K(gemm_dense), K(gemm_packed),
    K(narrow_x1), K(narrow_x2), K(narrow_x3), K(narrow_h1), K(narrow_h2), K(narrow_h4), K(narrow_meta),
    K(wide_half_bf16_128), K(wide_half_bf16_256), K(wide_half_w4_128), K(wide_half_w4_256), K(wide_half_w8_128),
    K(wide_half_w8_256), K(wide_fast_bf16), K(wide_fast_w4), K(wide_fast_w8), K(wide_split), K(wide_sum),
    K(hessian_update), K(random_fill), K(hessian_wide), K(hessian_scales), K(hessian_split),
    K(linear_reproducible), K(hessian_reproducible), K(rms_norm_reproducible), K(rope_reproducible),
    K(activation_reproducible), K(scores_reproducible), K(weights_reproducible), K(mix_reproducible),
    K(factor_prepare), K(factor_diagonal), K(factor_panel), K(factor_update), K(factor_inverse), K(factor_check),
    K(gptq_scales), K(gptq_gather), K(gptq_block), K(gptq_update), K(gptq_loss), K(round_input), K(input_codes),
    K(w8a8_few_1), K(w8a8_few_2), K(w8a8_few_4), K(w8a8_many), K(fp8_few_1), K(fp8_few_2), K(fp8_few_4), K(fp8_many),
    K(planted_clean), K(planted_read_past_end), K(planted_write_past_end), K(planted_write_beside),
    K(planted_write_input), K(planted_race), K(planted_race_global), K(planted_race_of_blocks), K(planted_last_block), K(planted_missing_fence),
    K(planted_divergent_barrier), K(planted_two_barriers), K(planted_mask), K(planted_shared_overrun),
    K(planted_missing_wait), K(planted_matrix), K(planted_matrix_wide), K(planted_matrix_bytes), K(planted_transpose), K(planted_null),
    K(planted_stack),
    {nullptr, nullptr, nullptr},
};
