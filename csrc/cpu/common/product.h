// C = epilogue(A @ B): a tiled, packed, threaded matrix product whose epilogue sees each finished
// row of a tile while it is in registers or L1, so that bias, ReLU, loss and update cost no pass.
//
// Layout of the work (Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication"):
// columns in panels of kVectors vectors; depth in blocks that keep a panel in L2; each thread takes
// rows of A in slabs of kRows, packed or in place, and a microkernel keeps a kRows x kVectors tile in
// registers.
// Threads split rows or panels, never the depth: a sum's order does not depend on the thread count.
//
// Included once per instruction set by common/for_each_isa.h, inside a namespace.

template <class Acc>
struct Vector {
  typedef Acc type __attribute__((vector_size(PYEXT_VECTOR_BYTES)));
  static constexpr int64_t lanes = PYEXT_VECTOR_BYTES / sizeof(Acc);
};

// Terms that one accumulator sums before it is added to the rest, which keeps the rounding error of
// a long sum down. With 128 the product at 64 x 1000 x 100 took 3 % longer.
constexpr int64_t kSumBlock = 256;

template <int kRows, int kVectors>
struct Tile {};

// acc[i][:] += a[i] * b[:] over the depth. A is packed as [depth][kRows], or its rows lie where they
// are (kInPlace); B is packed as [depth][vectors].
template <class Acc, int kRows, int kVectors, bool kInPlace>
__attribute__((noinline)) void microkernel(int64_t depth, const Acc* a, int64_t a_row_stride,
                                           const Acc* b, Acc* c, int64_t c_stride,
                                           bool accumulate) {
  using V = typename Vector<Acc>::type;
  constexpr int64_t lanes = Vector<Acc>::lanes;
  // In place three rows share a pointer: there are too few registers for one each.
  constexpr int kShare = kInPlace ? 3 : kRows, kPointers = (kRows + kShare - 1) / kShare;
  const int64_t row_stride = kInPlace ? a_row_stride : 1;
  const Acc* rows[kPointers];
  PYEXT_UNROLL for (int p = 0; p < kPointers; ++p) rows[p] = a + p * kShare * row_stride;
  V acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V b_row[kVectors];
    PYEXT_UNROLL for (int j = 0; j < kVectors; ++j)
      b_row[j] = *reinterpret_cast<const V*>(b + j * lanes);
    PYEXT_UNROLL for (int i = 0; i < kRows; ++i)
      PYEXT_UNROLL for (int j = 0; j < kVectors; ++j)
        acc[i][j] += rows[i / kShare][i % kShare * row_stride] * b_row[j];
    PYEXT_UNROLL for (int p = 0; p < kPointers; ++p) rows[p] += kInPlace ? 1 : kRows;
    b += kVectors * lanes;
  }
  PYEXT_UNROLL for (int i = 0; i < kRows; ++i)
    PYEXT_UNROLL for (int j = 0; j < kVectors; ++j) {
      V* out = reinterpret_cast<V*>(c + i * c_stride + j * lanes);
      *out = accumulate ? *out + acc[i][j] : acc[i][j];
    }
}

// The depth of a block: 1024 rows of a two-vector panel are 128 KiB, a part of L2.
constexpr int64_t kDepthBlock = 1024;
// Columns packed at once: 1024 x 2048 floats are 8 MiB, a share of L3.
constexpr int64_t kColumnBlock = 2048;
// Rows that a thread packs, or reads in place, for panel after panel: 96 x 1024 floats are 384 KiB, a
// part of L2.
constexpr int64_t kRowBlock = 96;
// Multiply-adds below which one thread is faster: waking the second costs about 5 µs.
constexpr int64_t kSerialWork = 1 << 18;

// The same over any depth, in blocks of kSumBlock.
template <class Acc, int kRows, int kVectors, bool kInPlace>
void multiply_tile(int64_t depth, const Acc* a, int64_t a_row_stride, const Acc* b, Acc* c,
                   bool accumulate) {
  constexpr int64_t kPanel = kVectors * Vector<Acc>::lanes, kStep = kInPlace ? 1 : kRows;
  for (int64_t k = 0; k == 0 || k < depth; k += kSumBlock)
    microkernel<Acc, kRows, kVectors, kInPlace>(std::min(kSumBlock, depth - k), a + k * kStep,
                                                a_row_stride, b + k * kPanel, c, kPanel,
                                                accumulate || k > 0);
}

// Whether rows of A are read where they lie. In bare loops over the tiles of 1024 x 784 x 512 packing
// takes 5 % of one thread's time and reading in place 2 %, as it does where rows start 2048 bytes
// apart. But those 4096 apart, as long as a way of L1, push each other out of it: 22 %.
template <class Acc>
bool is_read_in_place(const Matrix<const Acc>& a) {
  return a.column_stride == 1 && a.row_stride * int64_t(sizeof(Acc)) % 4096 != 0;
}

// Four rows of four become four columns: out[c * stride + r] = in[r * row_stride + c].
template <class T>
void transpose_4x4(const T* in, int64_t row_stride, T* out, int64_t stride) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  typedef Quad Unaligned __attribute__((aligned(alignof(T))));
  Quad row[4];
  for (int r = 0; r < 4; ++r) row[r] = *reinterpret_cast<const Unaligned*>(in + r * row_stride);
#if defined(__clang__)
#define PYEXT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Lane Lanes __attribute__((vector_size(4 * sizeof(T))));
#define PYEXT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif
  const Quad low_01 = PYEXT_SHUFFLE(row[0], row[1], 0, 4, 1, 5);
  const Quad low_23 = PYEXT_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const Quad high_01 = PYEXT_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
  const Quad high_23 = PYEXT_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  const Quad columns[4] = {
      PYEXT_SHUFFLE(low_01, low_23, 0, 1, 4, 5), PYEXT_SHUFFLE(low_01, low_23, 2, 3, 6, 7),
      PYEXT_SHUFFLE(high_01, high_23, 0, 1, 4, 5), PYEXT_SHUFFLE(high_01, high_23, 2, 3, 6, 7)};
  for (int c = 0; c < 4; ++c) *reinterpret_cast<Unaligned*>(out + c * stride) = columns[c];
#undef PYEXT_SHUFFLE
}

template <class Acc, class T>
void pack_b(const Matrix<const T>& b, int64_t k_begin, int64_t depth, int64_t j_begin,
            int64_t panel_columns, Acc* packed) {
  const int64_t columns = std::min(panel_columns, b.columns - j_begin);
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = b.at(k_begin + k, j_begin);
      Acc* out = packed + k * panel_columns;
      for (int64_t j = 0; j < columns; ++j) out[j] = Acc(row[j]);
      for (int64_t j = columns; j < panel_columns; ++j) out[j] = 0;
    }
    return;
  }
  int64_t j = 0;
  if constexpr (std::is_same_v<T, Acc>)
    for (; b.row_stride == 1 && j + 4 <= columns; j += 4) {  // by quads, as pack_a
      const Acc* in = b.at(k_begin, j_begin + j);
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4)
        transpose_4x4(in + k, b.column_stride, packed + k * panel_columns + j, panel_columns);
      for (; k < depth; ++k)
        for (int64_t c = 0; c < 4; ++c)
          packed[k * panel_columns + j + c] = in[c * b.column_stride + k];
    }
  for (; j < panel_columns; ++j)
    for (int64_t k = 0; k < depth; ++k)
      packed[k * panel_columns + j] = j < columns ? Acc(b(k_begin + k, j_begin + j)) : Acc(0);
}

// Slabs of kRows rows, [slab][depth][kRows]; missing rows of the last slab are zeros.
template <int kRows, class Acc, class T>
void pack_a(const Matrix<const T>& a, int64_t i_begin, int64_t rows, int64_t k_begin, int64_t depth,
            Acc* packed) {
  const int64_t whole = rows / kRows;
  if constexpr (std::is_same_v<T, Acc>) {
    if (a.row_stride == 1)  // a column at a time: what lies together is read together
      for (int64_t k = 0; k < depth && whole; ++k) {
        // Nothing else foresees which lines come next (2 % of a product of 784 x 1024 x 512).
        for (int64_t r = 0; k + 8 < depth && r < rows; r += 64 / int64_t(sizeof(Acc)))
          __builtin_prefetch(a.at(i_begin + r, k_begin + k + 8));
        for (int64_t slab = 0; slab < whole; ++slab)
          std::memcpy(packed + (slab * depth + k) * kRows,
                      a.at(i_begin + slab * kRows, k_begin + k), kRows * sizeof(Acc));
      }
  }
  for (int64_t slab = a.row_stride == 1 && std::is_same_v<T, Acc> ? whole : 0;
       slab < divide_up(rows, kRows); ++slab) {
    Acc* out = packed + slab * kRows * depth;
    const int64_t there = std::min<int64_t>(kRows, rows - slab * kRows);
    int64_t i = 0;
    // Element by element, packing took 12 % of a product of 1024 x 784 x 512.
    if constexpr (std::is_same_v<T, Acc>)
      for (; a.column_stride == 1 && i + 4 <= there; i += 4) {
        const Acc* in = a.at(i_begin + slab * kRows + i, k_begin);
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4)
          transpose_4x4(in + k, a.row_stride, out + k * kRows + i, kRows);
        for (; k < depth; ++k)
          for (int64_t r = 0; r < 4; ++r) out[k * kRows + i + r] = in[r * a.row_stride + k];
      }
    for (; i < there; ++i) {
      const T* in = a.at(i_begin + slab * kRows + i, k_begin);
      for (int64_t k = 0; k < depth; ++k) out[k * kRows + i] = Acc(in[k * a.column_stride]);
    }
    for (; i < kRows; ++i)
      for (int64_t k = 0; k < depth; ++k) out[k * kRows + i] = 0;
  }
}

// How the tiled product gets its operands and hands over its result.
template <class Acc>
struct Operands {
  int64_t m, n, depth;
  // A where its rows are read in place, else null.
  const Acc* a;
  int64_t a_row_stride;
  // (first row, rows, first k, depth, packed): slabs of kRows rows, [slab][depth][kRows]
  FunctionRef<void(int64_t, int64_t, int64_t, int64_t, Acc*)> pack_a;
  // (first column, first k, depth, packed): one panel, [depth][panel columns]
  FunctionRef<void(int64_t, int64_t, int64_t, Acc*)> pack_b;
  // B where it is packed already, over the whole depth, else null.
  const Acc* packed_b;
  // (first row, rows, first column, columns, sums, stride of the rows of sums)
  FunctionRef<void(int64_t, int64_t, int64_t, int64_t, const Acc*, int64_t)> finish;
};

// How the tasks of a product are arranged over C, one for each thread.
struct Grid {
  int64_t rows, columns;
};

// The arrangement that leaves the busiest thread the fewest tiles.
inline Grid split(int64_t slabs, int64_t panels, int64_t threads) {
  Grid best{1, 1};
  int64_t fewest = slabs * panels;
  for (int64_t rows = std::min(slabs, threads); rows > 0; --rows) {
    const int64_t columns = std::min(panels, threads / rows);
    const int64_t tiles = divide_up(slabs, rows) * divide_up(panels, columns);
    if (tiles < fewest) {
      fewest = tiles;
      best = {rows, columns};
    }
  }
  return best;
}

template <class Acc, int kRows, int kVectors, class Parallel>
void tiled_product(const Operands<Acc>& of, const Parallel& parallel) {
  constexpr int64_t kPanel = kVectors * Vector<Acc>::lanes;
  const int64_t m = of.m, n = of.n, depth = of.depth;
  const int64_t threads = m * n * depth < kSerialWork ? 1 : parallel.threads;

  const int64_t slabs = divide_up(m, kRows), row_block = std::max<int64_t>(kRowBlock / kRows, 1);
  const int64_t column_block = std::min(kColumnBlock / kPanel, divide_up(n, kPanel)) * kPanel;
  const int64_t depth_blocks = std::max<int64_t>(divide_up(depth, kDepthBlock), 1);
  // Whole sum blocks: every path then adds the same sums in the same order, so that which one a
  // thread's share of the rows takes does not show.
  const int64_t depth_block =
      divide_up(std::max<int64_t>(divide_up(depth, depth_blocks), 1), kSumBlock) * kSumBlock;
  const bool one_depth_block = depth <= depth_block;

  Buffer<Acc> packed_b(of.packed_b ? 0 : std::min(depth_block, depth) * column_block);
  // Sums of earlier depth blocks wait here; a single block goes from registers to the epilogue.
  Buffer<Acc> sums(one_depth_block ? 0 : m * column_block);

  for (int64_t j_begin = 0; j_begin < n; j_begin += column_block) {
    const int64_t panels = divide_up(std::min(column_block, n - j_begin), kPanel);
    const Grid grid = split(slabs, panels, threads);
    for (int64_t k_begin = 0; k_begin == 0 || k_begin < depth; k_begin += depth_block) {
      const int64_t block_depth = std::min(depth_block, depth - k_begin);
      const bool first = k_begin == 0, last = k_begin + block_depth >= depth;
      if (!of.packed_b)
        parallel(panels, threads, [&](int64_t begin, int64_t end) {
          for (int64_t panel = begin; panel < end; ++panel)
            of.pack_b(j_begin + panel * kPanel, k_begin, block_depth,
                      packed_b.get() + panel * kPanel * block_depth);
        });
      // Rows slab_begin … slab_end by panels panel_begin … panel_end of C.
      const auto multiply = [&](int64_t slab_begin, int64_t slab_end, int64_t panel_begin,
                                int64_t panel_end, Acc* packed_a, Acc* c) {
        // A last slab that lacks rows is packed in any case.
        const int64_t i_begin = slab_begin * kRows, i_end = std::min(slab_end * kRows, m);
        const int64_t i_packed = of.a ? i_end / kRows * kRows : i_begin;
        if (i_packed < i_end)
          of.pack_a(i_packed, i_end - i_packed, k_begin, block_depth, packed_a);
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t j = j_begin + panel * kPanel;
          const Acc* b_panel = of.packed_b ? of.packed_b + j * depth + k_begin * kPanel
                                           : packed_b.get() + panel * kPanel * block_depth;
          for (int64_t slab = slab_begin; slab < slab_end; ++slab) {
            const int64_t i = slab * kRows, rows = std::min<int64_t>(kRows, m - i);
            // The tile's place among the sums; a last slab may lack rows, so it goes by copy.
            Acc* waiting =
                one_depth_block ? nullptr : sums.get() + i * column_block + panel * kPanel;
            if (!first)
              for (int64_t r = 0; r < rows; ++r)
                std::memcpy(c + r * kPanel, waiting + r * column_block, kPanel * sizeof(Acc));
            if (i < i_packed)
              multiply_tile<Acc, kRows, kVectors, true>(block_depth,
                                                        of.a + i * of.a_row_stride + k_begin,
                                                        of.a_row_stride, b_panel, c, !first);
            else
              multiply_tile<Acc, kRows, kVectors, false>(block_depth,
                                                         packed_a + (i - i_packed) * block_depth, 0,
                                                         b_panel, c, !first);
            if (last)
              of.finish(i, rows, j, std::min(kPanel, n - j), c, kPanel);
            else
              for (int64_t r = 0; r < rows; ++r)
                std::memcpy(waiting + r * column_block, c + r * kPanel, kPanel * sizeof(Acc));
          }
        }
      };
      parallel(grid.rows * grid.columns, threads, [&](int64_t begin, int64_t end) {
        const int64_t packed_slabs = of.a ? 1 : std::min(row_block, divide_up(slabs, grid.rows));
        Buffer<Acc> packed_a(packed_slabs * kRows * block_depth);
        Buffer<Acc> tile(kRows * kPanel);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / grid.columns, column = task % grid.columns;
          const int64_t slab_end = slabs * (row + 1) / grid.rows;
          for (int64_t slab = slabs * row / grid.rows; slab < slab_end; slab += row_block)
            multiply(slab, std::min(slab + row_block, slab_end), panels * column / grid.columns,
                     panels * (column + 1) / grid.columns, packed_a.get(), tile.get());
        }
      });
    }
  }
}

#if PYEXT_VECTOR_REGISTERS == 32
// A matrix of B this large is read in place by every slab of rows, from L2.
constexpr int64_t kDirectBytes = 512 << 10;
// One of at most so many elements that lies by columns is first copied by rows, which is less work
// than to pack A and B (the gradient of hidden at 64 x 1000 x 100 x 10: 4.6 → 3.3 µs).
constexpr int64_t kTurnedElements = 4 << 10;
constexpr int kDirectRows = 4, kDirectVectors = 7;

// What a microkernel does with its sums and what is there before them.
struct Overwrite {
  static constexpr bool kReads = false;
  template <class V>
  V operator()(V, V sums) const {
    return sums;
  }
};
struct Accumulate {
  static constexpr bool kReads = true;
  template <class V>
  V operator()(V before, V sums) const {
    return before + sums;
  }
};

// c = merge(c, a @ b) for a slab of rows and all columns of B where it lies: 28 accumulators, and one
// vector of B at a time. The last vector, a Tail, overlaps the one before, so that nothing is read
// past a row's end; where a quarter of a vector suffices (hidden 100 is 6 x 16 + 4), it costs half as
// much. A's rows are neighbours (kUnitRows) if A is a transposed matrix.
template <class Acc, class Tail, bool kUnitRows, class Merge>
__attribute__((noinline)) void direct_microkernel(int64_t depth, const Acc* a, int64_t a_row_stride,
                                                  int64_t a_step, const Acc* b, int64_t b_step,
                                                  int64_t columns, Acc* c, int64_t c_row_stride,
                                                  const Merge& merge) {
  using V = typename Vector<Acc>::type;
  typedef V Full __attribute__((aligned(alignof(Acc))));
  typedef Tail Last __attribute__((aligned(alignof(Acc))));
  constexpr int64_t lanes = Vector<Acc>::lanes;
  constexpr int kFull = kDirectVectors - 1;
  const int64_t tail = columns - int64_t(sizeof(Tail) / sizeof(Acc));
  V acc[kDirectRows][kFull] = {};
  Tail acc_tail[kDirectRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Acc a_column[kDirectRows];
    PYEXT_UNROLL for (int i = 0; i < kDirectRows; ++i)
      a_column[i] = a[kUnitRows ? i : i * a_row_stride];
    PYEXT_UNROLL for (int j = 0; j < kFull; ++j) {
      const V b_vector = *reinterpret_cast<const Full*>(b + j * lanes);
      PYEXT_UNROLL for (int i = 0; i < kDirectRows; ++i) acc[i][j] += a_column[i] * b_vector;
    }
    const Tail b_tail = *reinterpret_cast<const Last*>(b + tail);
    PYEXT_UNROLL for (int i = 0; i < kDirectRows; ++i) acc_tail[i] += a_column[i] * b_tail;
    a += a_step;
    b += b_step;
  }
  PYEXT_UNROLL for (int i = 0; i < kDirectRows; ++i) {
    Acc* row = c + i * c_row_stride;
    // Because of the overlap the tail is merged before, and written after, the vectors.
    Tail merged = {};
    if constexpr (Merge::kReads) merged = *reinterpret_cast<const Last*>(row + tail);
    merged = merge(merged, acc_tail[i]);
    PYEXT_UNROLL for (int j = 0; j < kFull; ++j) {
      Full* out = reinterpret_cast<Full*>(row + j * lanes);
      V before = {};
      if constexpr (Merge::kReads) before = *out;
      *out = merge(before, acc[i][j]);
    }
    *reinterpret_cast<Last*>(row + tail) = merged;
  }
}

// Whether the product can do without packing: a hidden layer of 100 fits one panel of seven vectors.
template <class Acc>
bool is_direct(const Matrix<const Acc>& a, const Matrix<const Acc>& b) {
  constexpr int64_t lanes = Vector<Acc>::lanes;
  return divide_up(b.columns, lanes) == kDirectVectors && b.column_stride == 1 &&
         a.rows >= kDirectRows && b.rows * b.row_stride * int64_t(sizeof(Acc)) <= kDirectBytes;
}

// The sums are those of the packed product, in the same order.
template <class Acc, class Tail, bool kUnitRows, class Parallel, class Epilogue>
void direct_product(const Matrix<const Acc>& a, const Matrix<const Acc>& b,
                    const Parallel& parallel, const Epilogue& epilogue) {
  const int64_t n = b.columns;
  const int64_t threads = a.rows * n * b.rows < kSerialWork ? 1 : parallel.threads;
  parallel(divide_up(a.rows, kDirectRows), threads, [&](int64_t begin, int64_t end) {
    Acc tile[kDirectRows * kDirectVectors * Vector<Acc>::lanes];
    const auto multiply = [&](int64_t i, int64_t k, Acc* c, int64_t c_row_stride, auto merge) {
      direct_microkernel<Acc, Tail, kUnitRows>(
          std::min(kSumBlock, b.rows - k), a.at(i, k), a.row_stride, a.column_stride,
          b.data + k * b.row_stride, b.row_stride, n, c, c_row_stride, merge);
    };
    for (int64_t slab = begin; slab < end; ++slab) {
      // The last slab repeats rows of the one before rather than having fewer.
      const int64_t first = slab * kDirectRows, i = std::min(first, a.rows - kDirectRows);
      if constexpr (requires { epilogue.in_place(i); })
        if (i == first && b.rows <= kSumBlock && epilogue.can_be_in_place()) {
          multiply(i, 0, epilogue.in_place(i), epilogue.row_stride(), epilogue);
          continue;
        }
      multiply(i, 0, tile, n, Overwrite{});
      for (int64_t k = kSumBlock; k < b.rows; k += kSumBlock) multiply(i, k, tile, n, Accumulate{});
      for (int64_t r = first - i; r < kDirectRows; ++r) epilogue(i + r, 0, n, tile + r * n);
    }
  });
}

template <class Acc, class Parallel, class Epilogue>
void direct_product(const Matrix<const Acc>& a, const Matrix<const Acc>& b,
                    const Parallel& parallel, const Epilogue& epilogue) {
  using Full = typename Vector<Acc>::type;
  typedef Acc Quarter __attribute__((vector_size(PYEXT_VECTOR_BYTES / 4)));
  const auto run = [&]<class Tail>(Tail) {
    if (a.row_stride == 1)
      direct_product<Acc, Tail, true>(a, b, parallel, epilogue);
    else
      direct_product<Acc, Tail, false>(a, b, parallel, epilogue);
  };
  constexpr int64_t lanes = Vector<Acc>::lanes;
  if (b.columns - (kDirectVectors - 1) * lanes <= lanes / 4)
    run(Quarter{});
  else
    run(Full{});
}
#endif

// Rows of a slab where C is at most one vector wide: enough accumulators to hide the latency of four.
constexpr int kNarrowRows = 8;

// c = a @ b for a slab of rows, B packed as [depth][lanes]. A's rows are neighbours (kUnitRows) if A
// is a transposed matrix.
template <class Acc, bool kUnitRows>
__attribute__((noinline)) void narrow_microkernel(int64_t depth, const Acc* a, int64_t a_row_stride,
                                                  int64_t a_step, const Acc* b, Acc* c,
                                                  bool accumulate) {
  using V = typename Vector<Acc>::type;
  V acc[kNarrowRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const V b_row = *reinterpret_cast<const V*>(b);
    PYEXT_UNROLL for (int i = 0; i < kNarrowRows; ++i)
      acc[i] += a[kUnitRows ? i : i * a_row_stride] * b_row;
    a += a_step;
    b += Vector<Acc>::lanes;
  }
  PYEXT_UNROLL for (int i = 0; i < kNarrowRows; ++i) {
    V* out = reinterpret_cast<V*>(c + i * Vector<Acc>::lanes);
    *out = accumulate ? *out + acc[i] : acc[i];
  }
}

// A product of at most one vector's columns: each element of A is used once, so that packing it, as
// the tiled product does, would take as long as the product. The sums are the same.
template <class Acc, bool kUnitRows, class Parallel, class Epilogue>
void narrow_product(const Matrix<const Acc>& a, const Matrix<const Acc>& b,
                    const Parallel& parallel, const Epilogue& epilogue) {
  constexpr int64_t lanes = Vector<Acc>::lanes;
  const int64_t n = b.columns;
  const int64_t threads = a.rows * n * b.rows < kSerialWork ? 1 : parallel.threads;
  const Buffer<Acc> packed_b(b.rows * lanes);
  pack_b(b, 0, b.rows, 0, lanes, packed_b.get());
  parallel(divide_up(a.rows, kNarrowRows), threads, [&](int64_t begin, int64_t end) {
    alignas(64) Acc tile[kNarrowRows * lanes];
    for (int64_t slab = begin; slab < end; ++slab) {
      // The last slab repeats rows of the one before rather than having fewer.
      const int64_t first = slab * kNarrowRows, i = std::min(first, a.rows - kNarrowRows);
      for (int64_t k = 0; k == 0 || k < b.rows; k += kSumBlock)
        narrow_microkernel<Acc, kUnitRows>(std::min(kSumBlock, b.rows - k), a.at(i, k), a.row_stride,
                                           a.column_stride, packed_b.get() + k * lanes, tile,
                                           k > 0);
      for (int64_t r = first - i; r < kNarrowRows; ++r) epilogue(i + r, 0, n, tile + r * lanes);
    }
  });
}

// Whether `product` reads B where it lies, so that threads need not share a packed copy.
template <class Acc, class TA, class TB>
bool needs_no_packing(const Matrix<const TA>& a, const Matrix<const TB>& b) {
#if PYEXT_VECTOR_REGISTERS == 32
  if constexpr (std::is_same_v<TA, Acc> && std::is_same_v<TB, Acc>) return is_direct(a, b);
#endif
  return false;
}

// run(Tile<rows, vectors>{}) with the tile of the tiled product for so many columns of B. It fills the
// registers less one row of B and a broadcast of A; of two shapes the one that pads the columns less
// is taken (hidden 100 is 6.25 vectors of 16: 7 with the wide tile, 8 else).
template <class Acc, class F>
auto with_tile(int64_t columns, const F& run) {
  constexpr int64_t lanes = Vector<Acc>::lanes;
#if PYEXT_VECTOR_REGISTERS == 32
  const int64_t narrow = divide_up(columns, 2 * lanes) * 2;
  const int64_t wide = divide_up(columns, 7 * lanes) * 7;
  if (columns <= lanes) return run(Tile<14, 1>{});
  if (wide < narrow) return run(Tile<4, 7>{});
  return run(Tile<14, 2>{});
#else
  if (columns <= lanes) return run(Tile<8, 1>{});
  return run(Tile<6, 2>{});
#endif
}

// The width of the panels that the tiled product takes a B of so many columns in.
template <class Acc>
int64_t panel_width(int64_t columns) {
  return with_tile<Acc>(columns, []<int kRows, int kVectors>(Tile<kRows, kVectors>) {
    return kVectors * Vector<Acc>::lanes;
  });
}

// The tiled product of A and a B of so many columns: `packed_b`, or what `pack_b` packs,
// (first column, panel columns, first k, depth, packed).
template <class Acc, class TA, class Parallel, class Epilogue, class PackB>
void tiled_product(const Matrix<const TA>& a, int64_t columns, const Acc* packed_b,
                   const PackB& pack_b, const Parallel& parallel, const Epilogue& epilogue) {
  const auto finish = [&](int64_t i, int64_t rows, int64_t j, int64_t count, const Acc* sums,
                          int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) epilogue(i + r, j, count, sums + r * stride);
  };
  with_tile<Acc>(columns, [&]<int kRows, int kVectors>(Tile<kRows, kVectors>) {
    const auto pack_rows = [&](int64_t i, int64_t rows, int64_t k, int64_t depth, Acc* packed) {
      pack_a<kRows>(a, i, rows, k, depth, packed);
    };
    const auto pack_panel = [&](int64_t j, int64_t k, int64_t depth, Acc* packed) {
      pack_b(j, kVectors * Vector<Acc>::lanes, k, depth, packed);
    };
    const Acc* in_place = nullptr;
    if constexpr (std::is_same_v<TA, Acc>)
      if (is_read_in_place(a)) in_place = a.data;
    tiled_product<Acc, kRows, kVectors>(
        Operands<Acc>{a.rows, columns, a.columns, in_place, a.row_stride, pack_rows, pack_panel,
                      packed_b, finish},
        parallel);
  });
}

// epilogue(i, j, count, sums): row i, columns j … j + count of A @ B, in the accumulation type. It
// is called once for every element, from several threads, each call's elements on one of them.
template <class Acc, class TA, class TB, class Parallel, class Epilogue>
void product(const Matrix<const TA>& a, const Matrix<const TB>& b, Parallel parallel,
             const Epilogue& epilogue) {
  if (a.rows == 0 || b.columns == 0) return;
  constexpr int64_t lanes = Vector<Acc>::lanes;
#if PYEXT_VECTOR_REGISTERS == 32
  if constexpr (std::is_same_v<TA, Acc> && std::is_same_v<TB, Acc>) {
    if (is_direct(a, b)) return direct_product(a, b, parallel, epilogue);
    Matrix<const Acc> by_rows{nullptr, b.rows, b.columns, b.columns, 1};
    if (b.is_by_columns() && b.rows * b.columns <= kTurnedElements && is_direct(a, by_rows)) {
      const Buffer<Acc> turned(b.rows * b.columns);
      pack_b(b, 0, b.rows, 0, b.columns, turned.get());
      by_rows.data = turned.get();
      return direct_product(a, by_rows, parallel, epilogue);
    }
  }
#endif
  if constexpr (std::is_same_v<TA, Acc> && std::is_same_v<TB, Acc>)
    if (b.columns <= lanes && a.rows >= kNarrowRows)
      return a.row_stride == 1 ? narrow_product<Acc, true>(a, b, parallel, epilogue)
                               : narrow_product<Acc, false>(a, b, parallel, epilogue);
  tiled_product<Acc>(
      a, b.columns, nullptr,
      [&](int64_t j, int64_t width, int64_t k, int64_t depth, Acc* packed) {
        pack_b(b, k, depth, j, width, packed);
      },
      parallel, epilogue);
}

// Whether the product of A and so large a B is a tiled one, which can take B in panels.
template <class Acc, class TA>
bool can_take_panels(const Matrix<const TA>& a, int64_t columns) {
  return columns > Vector<Acc>::lanes &&
         !needs_no_packing<Acc>(a, Matrix<const Acc>{nullptr, a.columns, columns, columns, 1});
}

// The same product, of the same sums, where B lies in panels of panel_width(columns); its data, a
// Buffer's, is not null.
template <class Acc, class TA, class Parallel, class Epilogue>
void product(const Matrix<const TA>& a, const Panels<const Acc>& b, const Parallel& parallel,
             const Epilogue& epilogue) {
  if (a.rows == 0 || b.columns == 0) return;
  tiled_product<Acc>(
      a, b.columns, b.data, [](int64_t, int64_t, int64_t, int64_t, Acc*) {}, parallel, epilogue);
}
