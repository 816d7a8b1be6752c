// A step of decoding in one call, without a line of Python between its kernels.
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/scratch.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kMostRows = 64;  // that go through the layers together: what the products' tiles take at once
constexpr int64_t kLeastRows = 16;  // fewer cost as much

M4OV_INLINE int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }
M4OV_INLINE const int32_t* first_axis() {
  static const int32_t axes[1024] = {};
  return axes;
}

struct Part {
  const DecodeStep& a;
  int64_t first, rows;
  int threads;

  struct Buffers {
    char *hidden, *next, *made, *normed, *q, *k, *v, *turned_q, *turned_k, *attended, *gate, *up, *kernel;
    float* rstd;

    Buffers(Scratch& scratch, const Part& part) {
      const DecodeStep& a = part.a;
      const auto of = [&](int64_t width) { return scratch.take<char>(part.rows * width * size_of(a.dtype)); };
      const int64_t q_width = a.heads * a.dim, k_width = a.kv_heads * a.dim;
      hidden = of(a.width), next = of(a.width), made = of(a.width), normed = of(a.width);
      q = of(q_width), k = of(k_width), v = of(k_width);
      turned_q = of(q_width), turned_k = of(k_width), attended = of(q_width);
      gate = of(a.inner), up = of(a.inner);
      rstd = scratch.take<float>(part.rows);
      kernel = scratch.take<char>(part.kernel_bytes());
    }
  };

  InvariantLinear linear(const void* input, const void* weight, const void* bias, void* output, int64_t columns,
                         int64_t width, char* scratch) const {
    return {input, weight, bias, output, rows, columns, width, width, width, 0, a.dtype, threads, scratch};
  }

  DecodeAttention attention(const DecodeLayer& layer, const Buffers* b) const {
    return {b ? b->attended : nullptr, b ? b->turned_q : nullptr, layer.keys,  layer.values, a.prefix_first + first,
            a.prefix_keys + first,     a.own_first + first,       nullptr,     rows,         a.heads,
            a.kv_heads,                a.dim,                     a.scale,     a.dtype,      threads,
            b ? b->kernel : nullptr};
  }

  int64_t kernel_bytes() const {
    const int64_t q_width = a.heads * a.dim, shapes[][2] = {{q_width, a.width}, {a.kv_heads * a.dim, a.width},
                                                            {a.width, q_width}, {a.inner, a.width}, {a.width, a.inner}};
    int64_t bytes = decode_attention(attention(DecodeLayer{}, nullptr));
    for (const auto& shape : shapes) {
      const int64_t needed = invariant_linear(linear(nullptr, nullptr, nullptr, nullptr, shape[0], shape[1], nullptr));
      bytes = larger(bytes, needed);
    }
    return bytes;
  }

  void norm(char* normed, char* sum, const char* hidden, const void* weight, const char* residual,
            const Buffers& b) const {
    rms_norm_fwd({normed, sum, b.rstd, hidden, weight, residual, rows, a.width, a.width, a.width,
                  static_cast<float>(a.eps), kHf, a.dtype, threads});
  }

  void run(Buffers& b, const int64_t* seen) const {
    const int64_t size = size_of(a.dtype), row = a.width * size;
    for (int64_t i = 0; i < rows; ++i) {
      memcpy(b.hidden + i * row, static_cast<const char*>(a.embedding) + a.tokens[first + i] * row, row);
    }
    for (int64_t l = 0; l < a.depth; ++l) {
      const DecodeLayer& layer = a.layers[l];
      if (l == 0) {
        norm(b.normed, nullptr, b.hidden, layer.input_norm, nullptr, b);
      } else {
        norm(b.normed, b.next, b.made, layer.input_norm, b.hidden, b);
        swap(b);
      }
      attend(layer, b, seen);
      invariant_linear(linear(b.attended, layer.o, layer.o_bias, b.made, a.width, a.heads * a.dim, b.kernel));
      norm(b.normed, b.next, b.made, layer.post_norm, b.hidden, b);
      swap(b);
      invariant_linear(linear(b.normed, layer.gate, layer.gate_bias, b.gate, a.inner, a.width, b.kernel));
      invariant_linear(linear(b.normed, layer.up, layer.up_bias, b.up, a.inner, a.width, b.kernel));
      const int64_t count = rows * a.inner;
      swiglu_fwd({b.gate, b.gate, b.up, 1, count, count, count, kHf, a.dtype, threads});
      invariant_linear(linear(b.gate, layer.down, layer.down_bias, b.made, a.width, a.inner, b.kernel));
    }
    norm(static_cast<char*>(a.normed) + first * row, b.next, b.made, a.norm, b.hidden, b);
  }

  static void swap(Buffers& b) {
    char* hidden = b.hidden;
    b.hidden = b.next;
    b.next = hidden;
  }

  void attend(const DecodeLayer& layer, const Buffers& b, const int64_t* seen) const {
    const int64_t q_width = a.heads * a.dim, k_width = a.kv_heads * a.dim, row = k_width * size_of(a.dtype);
    invariant_linear(linear(b.normed, layer.q, layer.q_bias, b.q, q_width, a.width, b.kernel));
    invariant_linear(linear(b.normed, layer.k, layer.k_bias, b.k, k_width, a.width, b.kernel));
    invariant_linear(linear(b.normed, layer.v, layer.v_bias, b.v, k_width, a.width, b.kernel));
    RopeFwd rope{};
    rope.angles.positions = a.positions + first;
    rope.angles.token_stride = 1;
    rope.angles.inv_freq = a.inv_freq;
    rope.angles.axis = first_axis();
    rope.angles.merge_size = rope.angles.axes = rope.angles.wide = rope.angles.single = 1;
    rope.tensors[0] = {b.turned_q, b.q, layer.q_norm, a.heads, q_width, a.dim};
    rope.tensors[1] = {b.turned_k, b.k, layer.k_norm, a.kv_heads, k_width, a.dim};
    rope.tokens = rows, rope.dim = a.dim, rope.half = a.dim / 2;
    rope.eps = a.eps;
    rope.numerics = kHf, rope.dtype = a.dtype, rope.threads = threads;
    rope_fwd(rope);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t to = (a.own_first[first + i] + a.own_keys[first + i]) * row;
      memcpy(static_cast<char*>(layer.keys) + to, b.turned_k + i * row, row);
      memcpy(static_cast<char*>(layer.values) + to, b.v + i * row, row);
    }
    DecodeAttention call = attention(layer, &b);
    call.own_keys = seen + first;
    decode_attention(call);
  }
};

}  // namespace

// Rows are nobody's business but their own: each thread takes some of them through all layers, and waits for nobody. Of
// fewer than that is worth, all threads share each product.
int64_t decode_step(const DecodeStep& a) {
  const int64_t each = rounded_up(blocks_of(a.rows, a.threads), kLeastRows);
  const int64_t size = smaller(larger(each, kLeastRows), kMostRows), parts = blocks_of(a.rows, size);
  const int team = parts < a.threads ? static_cast<int>(larger(parts, 1)) : a.threads;
  const int inner = team > 1 ? 1 : a.threads;
  Scratch scratch{a.scratch};
  int64_t* seen = scratch.take<int64_t>(a.rows);  // of each sample's own keys, with this token's
  const int64_t common = scratch.used;
  Scratch one{a.scratch, common};
  const Part largest{a, 0, smaller(size, a.rows), inner};
  Part::Buffers(one, largest);
  const int64_t apart = one.used - common;
  if (!a.scratch) return common + apart * team;

  for (int64_t i = 0; i < a.rows; ++i) seen[i] = a.own_keys[i] + 1;
#pragma omp parallel for num_threads(team) schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part) {
    Scratch rest{a.scratch, common + apart * omp_get_thread_num()};
    const Part work{a, part * size, smaller(size, a.rows - part * size), inner};
    Part::Buffers buffers(rest, work);
    work.run(buffers, seen);
  }
  return 0;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
