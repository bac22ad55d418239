// One token of a batch of texts through a whole model of Llama's kind: one call, one team of threads.
//
// A layer is x + o(attention(rope(q, k), v)) and x + down(act(gate) * up), each after an RMS norm. The threads share out
// the rows of every product and the heads of the attention, and meet at a barrier after each: five times a layer.
// What lies between is so little that every thread does it for itself in memory of its own (the residual stream,
// norms, the gate, laying inputs out), which costs less than meeting once more.
//
// Nothing is allocated here: the caller's scratch holds everything, and `secateur_step_bytes` says how much that is.
// Everything was verified by the caller (sparse/step.py).
#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "inputs.h"
#include "rows.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace secateur {
namespace {

// Up to three matrices that read the same input, outputs side by side.
struct Product {
  const Matrix* parts[3];
  i64 count, rows;    // rows: of all parts
  const float* bias;  // [rows], or null
};

struct Layer {
  Product qkv, o, gate_up, down;
  const float *before_attention, *before_ffn;  // weights of the norms [hidden]
  const float *query_norm, *key_norm;          // of a norm of every head [size], or null
  i64 queries, groups, size;                   // heads of queries, of keys and values; entries of a head
  float eps, head_eps, scale;
  i32 act;
};

struct Model {
  const Layer* layers;
  i64 count, hidden;
  Product head;
  const float* norm;
  float eps;
  i32 level;
};

struct Token {
  const float* x;                // [batch, hidden]
  const float *cosine, *sine;    // [size]: the angles of position `at`
  float* const* caches;          // keys and values [batch, groups, room, size] of each layer; position `at` is written
  float* logits;                 // [batch, rows of the head]
  i64 batch, room, at;
};

inline i64 stride_of(i64 columns) { return rounded(columns, 64) + SPARE; }

inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// Hands out pieces of a block of memory, each on a cache line of its own, or only counts them.
struct Pieces {
  char* base;
  i64 used = 0;
  template <class T>
  T* take(i64 count) {
    const i64 was = used;
    used += rounded(count * i64(sizeof(T)), 64);
    return base ? (T*)(base + was) : nullptr;
  }
};

// The largest of everything in any layer.
struct Sizes {
  i64 qkv = 0, input = 0, both = 0, laid = 0, compact = 0, lanes = 0, partial = 0;

  Sizes(const Model& model, i64 batch) {
    const Kernels& k = *kernels_of(model.level);
    for (i64 i = 0; i < model.count; i++) {
      const Layer& l = model.layers[i];
      qkv = larger(qkv, l.qkv.rows), both = larger(both, l.gate_up.rows);
      for (const Product* p : {&l.qkv, &l.o, &l.gate_up, &l.down}) add(*p, k, batch);
    }
    add(model.head, k, batch);
  }
  void add(const Product& p, const Kernels& k, i64 batch) {
    for (i64 i = 0; i < p.count; i++) {
      const Matrix& m = *p.parts[i];
      input = larger(input, stride_of(m.columns));
      if (m.kind == COLUMNS) partial = larger(partial, rounded(m.rows, 64)), lanes = larger(lanes, m.columns);
      else laid = larger(laid, i64(bytes_of(form_of(m, k, false, batch), m.columns, GROUP)));
      if (m.kind == TILE) compact = larger(compact, i64(bytes_of(ROWS, m.columns, GROUP)));
    }
  }
};

// What all threads read and write. Rows of inputs are padded to what the kernels read at once.
struct Shared {
  float *qkv, *attended, *out, *both, *partial;

  Shared(Pieces& pieces, const Model& model, const Sizes& sizes, i64 batch, i64 threads)
      : qkv(pieces.take<float>(batch * sizes.qkv)),
        attended(pieces.take<float>(rounded(batch, GROUP) * sizes.input)),
        out(pieces.take<float>(batch * model.hidden)),
        both(pieces.take<float>(batch * sizes.both)),
        partial(pieces.take<float>(threads * sizes.partial)) {}
};

// What a thread has for itself.
struct Own {
  float *x, *input, *query, *key, *scores, *values;
  i32* active;
  char *laid, *compact;

  Own(Pieces& pieces, const Model& model, const Sizes& sizes, i64 batch, i64 room)
      : x(pieces.take<float>(batch * model.hidden)),
        input(pieces.take<float>(rounded(batch, GROUP) * sizes.input)),
        query(pieces.take<float>(sizes.qkv)),
        key(pieces.take<float>(sizes.qkv)),
        scores(pieces.take<float>(room)),
        values(pieces.take<float>(sizes.lanes)),
        active(pieces.take<i32>(sizes.lanes)),
        laid(pieces.take<char>(sizes.laid)),
        compact(pieces.take<char>(sizes.compact)) {}
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Where threads wait for each other. They spin: products end at nearly the same time, and a thread that steps aside may
// not come back for milliseconds. Only where there are more threads than processors do they step aside soon.
class Barrier {
 public:
  void wait(i64 threads) {
    if (threads == 1) return;
    const i64 round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    const i64 patience = threads > processors_ ? 100 : 100'000;
    for (i64 turns = 0; round_.load(std::memory_order_acquire) == round; turns++) {
      if (turns < patience) pause();
#if defined(__unix__) || defined(__APPLE__)
      else sched_yield();
#endif
    }
  }

 private:
#if defined(_OPENMP)
  const i64 processors_ = omp_get_num_procs();
#else
  const i64 processors_ = 1;
#endif
  alignas(64) std::atomic<i64> arrived_{0};
  alignas(64) std::atomic<i64> round_{0};
};

// One thread of the team.
struct Worker {
  const Model& model;
  const Token& token;
  const Kernels& kernels;
  const Shared& shared;
  Barrier& barrier;
  Own own;
  i64 thread, threads;

  void run() {
    const i64 n = model.hidden;
    memcpy(own.x, token.x, sizeof(float) * size_t(token.batch * n));
    for (i64 i = 0; i < model.count; i++) {
      const Layer& l = model.layers[i];
      norm(l.before_attention, l.eps, i > 0);
      product(l.qkv, own.input, shared.qkv);
      attend(l, token.caches[2 * i], token.caches[2 * i + 1]);
      product(l.o, shared.attended, shared.out);
      norm(l.before_ffn, l.eps, true);
      product(l.gate_up, own.input, shared.both);
      gate(l);
      product(l.down, own.input, shared.out);
    }
    norm(model.norm, model.eps, model.count > 0);
    product(model.head, own.input, token.logits);
  }

  // The input of the next product: the residual stream, after the last product's output is added to it, normed.
  void norm(const float* weight, float eps, bool add) {
    const i64 n = model.hidden, stride = stride_of(n);
    for (i64 b = 0; b < token.batch; b++) {
      float *x = own.x + b * n, *y = own.input + b * stride;
      if (add) add_row(x, shared.out + b * n, n);
      norm_row(x, weight, y, n, eps);
      memset(y + n, 0, sizeof(float) * size_t(stride - n));
    }
  }

  void gate(const Layer& l) {
    const i64 n = l.gate_up.rows / 2, stride = stride_of(n);
    for (i64 b = 0; b < token.batch; b++) {
      float* y = own.input + b * stride;
      gate_row(Act(l.act), shared.both + 2 * b * n, y, n);
      memset(y + n, 0, sizeof(float) * size_t(stride - n));
    }
  }

  // This thread's rows of y [batch, rows] from x [batch, stride], and the meeting.
  void product(const Product& p, const float* x, float* y) {
    for (i64 i = 0, done = 0; i < p.count; done += p.parts[i++]->rows) {
      const Matrix& m = *p.parts[i];
      const Output out{y + done, false, p.rows, p.bias ? p.bias + done : nullptr};
      if (m.kind == COLUMNS) by_columns(m, x, out);
      else by_lines(m, x, out);
    }
    barrier.wait(threads);
  }

  void by_lines(const Matrix& m, const float* x, const Output& whole) {
    const i64 stride = stride_of(m.columns), lines = lines_of(m);
    const i64 begin = lines * thread / threads, end = lines * (thread + 1) / threads;
    if (begin == end) return;
    const Form form = form_of(m, kernels, false, token.batch);
    const i64 most = form == LANES ? BLOCK : GROUP;
    for (i64 first = 0; first < token.batch; first += most) {
      const i64 count = token.batch - first < most ? token.batch - first : most;
      Input in;
      if (form == ROWS || (form == FLOATS && count == 1))  // as they lie
        in.data = x + first * stride, in.form = form, in.tokens = count, in.stride = stride;
      else lay({x, false, m.columns, stride}, first, count, form, in, own.laid);
      const Output out{(float*)whole.data + first * whole.rows, false, whole.rows, whole.bias};
      multiply(kernels, m, in, out, begin, end, own.compact);
    }
  }

  // Inputs that are zero are skipped; each thread does its share of the others for all rows, and then of the sums.
  void by_columns(const Matrix& m, const float* x, const Output& out) {
    const i64 stride = stride_of(m.columns), rows = rounded(m.rows, 64);
    float* const mine = shared.partial + thread * rows;
    for (i64 b = 0; b < token.batch; b++) {
      i64 count = 0;
      for (i64 c = 0; c < m.columns; c++)
        if (x[b * stride + c] != 0) own.values[count] = x[b * stride + c], own.active[count++] = i32(c);
      const i64 begin = count * thread / threads, end = count * (thread + 1) / threads;
      memset(mine, 0, sizeof(float) * size_t(rows));
      kernels.columns(m, own.active + begin, own.values + begin, end - begin, mine);
      barrier.wait(threads);
      float* const y = (float*)out.data + b * out.rows;
      for (i64 row = m.rows * thread / threads; row < m.rows * (thread + 1) / threads; row++) {
        float sum = 0;
        for (i64 t = 0; t < threads; t++) sum += shared.partial[t * rows + row];
        y[row] = sum * (m.scales ? m.scales[row] : 1.0f) + (out.bias ? out.bias[row] : 0.0f);
      }
      barrier.wait(threads);
    }
  }

  // This thread's query heads. A key is turned by every thread that needs it, and written to the cache by the one that
  // has the first query of its group; nobody reads it from there in this step.
  void attend(const Layer& l, float* keys, float* values) {
    const i64 size = l.size, share = l.queries / l.groups, tasks = token.batch * l.queries;
    const i64 width = l.queries * size, stride = stride_of(width);
    i64 turned = -1;
    for (i64 task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
      const i64 b = task / l.queries, h = task % l.queries, g = h / share, cache = (b * l.groups + g) * token.room * size;
      const float* const row = shared.qkv + b * l.qkv.rows;
      const float* const value = row + (l.queries + l.groups + g) * size;
      if (turned != b * l.groups + g) {
        head(row + (l.queries + g) * size, l.key_norm, l, own.key);
        turned = b * l.groups + g;
      }
      if (h % share == 0) {
        memcpy(keys + cache + token.at * size, own.key, sizeof(float) * size_t(size));
        memcpy(values + cache + token.at * size, value, sizeof(float) * size_t(size));
      }
      head(row + h * size, l.query_norm, l, own.query);
      const Past past{keys + cache, values + cache, own.key, value, token.at, size};
      float* const out = shared.attended + b * stride;
      attend_head(own.query, past, out + h * size, own.scores, l.scale);
      if (h == l.queries - 1) memset(out + width, 0, sizeof(float) * size_t(stride - width));
    }
    barrier.wait(threads);
  }

  void head(const float* from, const float* weight, const Layer& l, float* to) {
    if (weight) norm_row(from, weight, to, l.size, l.head_eps);
    else memcpy(to, from, sizeof(float) * size_t(l.size));
    turn(to, token.cosine, token.sine, l.size);
  }
};

}  // namespace
}  // namespace secateur

using namespace secateur;

// Bytes of scratch that a step needs; they must be zero before the first one, and belong to one step at a time.
EXPORT i64 secateur_step_bytes(const Model* model, i64 batch, i64 room, i32 threads) {
  const Sizes sizes(*model, batch);
  Pieces pieces{nullptr};
  Shared(pieces, *model, sizes, batch, threads);
  for (i32 t = 0; t < threads; t++) Own(pieces, *model, sizes, batch, room);
  return pieces.used;
}

// Adds one token to every text of the batch; see Token.
EXPORT void secateur_step(const Model* model, const Token* token, void* scratch, i32 threads) {
  const Sizes sizes(*model, token->batch);
  const Kernels& kernels = *kernels_of(model->level);
  const auto work = [&](Barrier& barrier, i64 thread, i64 of) {
    Pieces pieces{(char*)scratch};
    const Shared shared(pieces, *model, sizes, token->batch, threads);
    const i64 whole = pieces.used;
    Own(pieces, *model, sizes, token->batch, token->room);
    pieces.used = whole + thread * (pieces.used - whole);
    const Own own(pieces, *model, sizes, token->batch, token->room);
    Worker{*model, *token, kernels, shared, barrier, own, thread, of}.run();
  };
  Barrier barrier;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(barrier, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(barrier, 0, 1);
}
