// A convolution, 2 × 2 max pooling and ReLU on one core's tile unit (AMX): forward, and back with the
// SGD step of its weights. `potluck.engine.native.conv_pool` compiles it.
//
//     a[y, x, c] = Σ over dy, dx, i of K[c, i, dy, dx] · image[y + dy - r, x + dx - r, i]      r = kernel / 2
//     z = max(0, b + max of the four a of a pool)
//
// Images are bfloat16 with the channels last, and are copied into zeros that reach r further. What a row
// of the kernel covers, kernel · in numbers, then lies together, and so do 16 places next to each other,
// each `in` further than the last: left factors of the unit are read where they are. Sums are float32.
//
// Going back, ∂ℓ/∂a is that of the pool at the largest of its four and zero elsewhere. ∂ℓ/∂image is a
// convolution of it with the kernel turned round. The gradient of the kernel is a sum over places, so there
// the images are turned, so that places of a channel lie together, and meet ∂ℓ/∂a in pairs of places.
//
// kernel is odd, height and width even, out a multiple of COLUMNS, in one or a multiple of COLUMNS; with
// one channel nothing flows back to the images.

#include "amx.hpp"

#if defined(HAS_TILES)

constexpr uint8_t NONE = 4;  // for ReLU's zero, where 0 to 3 say which of a pool is the largest
constexpr int TILE = 2 * EDGE * EDGE;  // numbers of a tile
constexpr int LINE = 2 * EDGE;  // places of a channel on a line of the cache, and of a tile's row
constexpr int MARGIN = LINE / 2;  // pairs that are zeros, before and after those of an image
constexpr int GROUP = 8;  // images whose places are summed before sums go back to memory

struct Shape {
    int height, width, in, out, kernel;

    int reach() const { return kernel / 2; }
    int row() const { return width + kernel - 1; }  // places of a row with its zeros, an even number
    int places() const { return whole_panels(height * row()); }
    // of a channel with its zeros, and what tiles read beyond
    int length() const { return places() + whole_panels((kernel + 1) * row() + COLUMNS); }
    int64_t padded(int channels) const { return int64_t(length()) * channels + 4 * EDGE; }
};

struct Rooms {
    std::vector<uint16_t> images, turned, gradients, panel;
    std::vector<uint32_t> pairs;
    std::vector<float> results, sums, biases;
};

static Rooms& rooms_of() {
    static thread_local Rooms rooms;
    return rooms;
}

template <class T>
static T* zeros(std::vector<T>& room, int64_t size) {
    T* found = of(room, size);
    std::memset(found, 0, sizeof(T) * size);
    return found;
}

static inline void narrow(__m512i from, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(from));
}

static inline void narrow(Floats from, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(__m512(from))));
}

// an image [height, width, in] into zeros
static void pad(const Shape& s, const uint16_t* image, uint16_t* to) {
    for (int y = 0; y < s.height; y++)
        std::memcpy(to + (int64_t(y + s.reach()) * s.row() + s.reach()) * s.in,
                    image + int64_t(y) * s.width * s.in, 2 * s.width * s.in);
}

static int depth_of(int row) { return whole_panels(row) / COLUMNS; }  // tiles of a kernel's row

// numbers `step` apart
static inline __m512i steps(int step) {
    return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                              _mm512_set1_epi32(step));
}

// A kernel [out, in, kernel, kernel] in tiles [kernel, depth, columns / EDGE, EDGE, EDGE, 2], whose columns
// are `out`, or with TURNED `in`, of the kernel turned round.
template <bool TURNED>
static uint16_t* pack_kernel(const Shape& s, const float* kernel, std::vector<uint16_t>& room) {
    const int side = s.kernel, taps = side * side, row = side * (TURNED ? s.out : s.in);
    const int columns = TURNED ? s.in : s.out, inner = row / side, depth = depth_of(row);
    const __m512i column = steps(TURNED ? taps : s.in * taps);
    uint16_t* packed = of(room, int64_t(side) * depth * columns * 2 * EDGE);
    uint16_t* to = packed;
    for (int dy = 0; dy < side; dy++)
        for (int first = 0; first < depth * 2 * EDGE; first += 2 * EDGE)
            for (int n = 0; n < columns; n += EDGE)
                for (int place = first; place < first + 2 * EDGE; place += 2, to += 2 * EDGE) {
                    __m512i two[2] = {};
                    for (int j = 0; j < 2 && place + j < row; j++) {
                        const int dx = (place + j) / inner, channel = (place + j) % inner;
                        const int tap = TURNED ? taps - 1 - dy * side - dx : dy * side + dx;
                        const int first_of = TURNED ? channel * s.in + n : n * s.in + channel;
                        two[j] = BFloat16::rounded(
                            Floats(_mm512_i32gather_ps(column, kernel + first_of * taps + tap, 4)));
                    }
                    _mm512_storeu_si512(to, two[0] | _mm512_slli_epi32(two[1], 16));
                }
    return packed;
}

// kernel += factor · sums, whose rows are [kernel, across] with `out` numbers each
static void step(const Shape& s, const float* sums, int across, float factor, float* kernel) {
    const int side = s.kernel, taps = side * side;
    const __m512i channels = steps(s.in * taps);
    for (int c = 0; c < s.out; c += EDGE)
        for (int i = 0; i < s.in; i++)
            for (int tap = 0; tap < taps; tap++) {
                float* at = kernel + (c * s.in + i) * taps + tap;
                const int row = tap / side * across + tap % side * s.in + i;
                const Floats gradient = load(sums + int64_t(row) * s.out + c);
                const Floats before = Floats(_mm512_i32gather_ps(channels, at, 4));
                _mm512_i32scatter_ps(at, channels, __m512(before + factor * gradient), 4);
            }
}

// Two rows of a convolution at a time, and COLUMNS of its columns: `then(y, column, upper, lower)` gets
// them as [width, COLUMNS]. `padded` has `inner` channels.
template <class Then>
static void convolve(const Shape& s, int inner, const uint16_t* padded, const uint16_t* packed,
                     int columns, std::vector<float>& room, Then then) {
    const int depth = depth_of(s.kernel * inner);
    const int64_t row = int64_t(s.row()) * inner;
    const int last = s.width > EDGE ? s.width - EDGE : 0;  // the last tile may overlap the one before
    float* upper = of(room, 2 * int64_t(last + EDGE) * COLUMNS);
    float* lower = upper + int64_t(last + EDGE) * COLUMNS;
    for (int n = 0; n < columns; n += COLUMNS)
        for (int y = 0; y < s.height; y += 2) {
            for (int from = 0; from < s.width; from += EDGE) {
                const int x = from < last ? from : last;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int dy = 0; dy < s.kernel; dy++) {
                    const uint16_t* left = padded + (y + dy) * row + int64_t(x) * inner;
                    const uint16_t* right =
                        packed + (int64_t(dy) * depth * (columns / EDGE) + n / EDGE) * TILE;
                    for (int k = 0; k < depth; k++, right += columns / EDGE * TILE) {
                        _tile_loadd(4, left + k * 2 * EDGE, 2 * inner);
                        _tile_loadd(6, right, 4 * EDGE);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, right + TILE, 4 * EDGE);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, left + row + k * 2 * EDGE, 2 * inner);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, upper + x * COLUMNS, 4 * COLUMNS);
                _tile_stored(1, upper + x * COLUMNS + EDGE, 4 * COLUMNS);
                _tile_stored(2, lower + x * COLUMNS, 4 * COLUMNS);
                _tile_stored(3, lower + x * COLUMNS + EDGE, 4 * COLUMNS);
            }
            written();
            then(y, n, upper, lower);
        }
}

// EDGE columns of a pool: the largest of four and where it is, plus the bias, or zero
static inline void pool(const float* upper, const float* lower, const float* bias, uint16_t* pooled,
                        uint8_t* which) {
    __m512 best = _mm512_loadu_ps(upper);
    __m512i place = _mm512_setzero_si512();
    const float* others[3] = {upper + COLUMNS, lower, lower + COLUMNS};
    for (int p = 0; p < 3; p++) {
        const __m512 other = _mm512_loadu_ps(others[p]);
        const __mmask16 larger = _mm512_cmp_ps_mask(other, best, _CMP_GT_OQ) |
                                 _mm512_cmp_ps_mask(other, other, _CMP_UNORD_Q);
        best = _mm512_mask_mov_ps(best, larger, other);
        place = _mm512_mask_mov_epi32(place, larger, _mm512_set1_epi32(p + 1));
    }
    best = _mm512_add_ps(best, _mm512_loadu_ps(bias));
    const __mmask16 none = _mm512_cmp_ps_mask(best, _mm512_setzero_ps(), _CMP_LE_OQ);
    narrow(Floats(_mm512_mask_mov_ps(best, none, _mm512_setzero_ps())), pooled);
    place = _mm512_mask_mov_epi32(place, none, _mm512_set1_epi32(NONE));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(which), _mm512_cvtepi32_epi8(place));
}

// images [num, height, width, in] and kernel [out, in, kernel, kernel] to pooled and which [num, height / 2,
// width / 2, out]
static void forward(int64_t num, const Shape& s, const uint16_t* images, const float* kernel,
                    const float* bias, uint16_t* pooled, uint8_t* which) {
    Rooms& rooms = rooms_of();
    TileShapes shapes;
    const uint16_t* packed = pack_kernel<false>(s, kernel, rooms.panel);
    uint16_t* padded = zeros(rooms.images, s.padded(s.in));
    written();
    shapes.rows(EDGE);
    const int64_t size = int64_t(s.height) * s.width, pools = size / 4;
    for (int64_t m = 0; m < num; m++) {
        pad(s, images + m * size * s.in, padded);
        written();
        convolve(s, s.in, padded, packed, s.out, rooms.results,
                 [&](int y, int n, const float* upper, const float* lower) {
                     for (int x = 0; x < s.width; x += 2)
                         for (int j = 0; j < COLUMNS; j += EDGE) {
                             const int64_t at =
                                 (m * pools + y / 2 * (s.width / 2) + x / 2) * s.out + n + j;
                             pool(upper + x * COLUMNS + j, lower + x * COLUMNS + j, bias + n + j,
                                  pooled + at, which + at);
                         }
                 });
    }
}

// The gradient of an image's pools as pairs of places next to each other [places / 2, out], in `padded`
// if there is such, and added to `biases`. What is zero for all images is left as it was.
static void spread(const Shape& s, const uint16_t* into, const uint8_t* which, uint32_t* pairs,
                   uint16_t* padded, float* biases) {
    const int64_t row = int64_t(s.row()) * s.out;
    for (int y = 0; y < s.height; y += 2)
        for (int x = 0; x < s.width; x += 2)
            for (int c = 0; c < s.out; c += EDGE) {
                const int64_t at = (int64_t(y / 2) * (s.width / 2) + x / 2) * s.out + c;
                const __m512i gradient = wide(into + at), upper = _mm512_slli_epi32(gradient, 16);
                const __m512i place = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(which + at)));
                __m512i each[4];
                for (int p = 0; p < 4; p++) {
                    const __mmask16 here = _mm512_cmpeq_epi32_mask(place, _mm512_set1_epi32(p));
                    each[p] = _mm512_maskz_mov_epi32(here, p % 2 ? upper : gradient);
                }
                uint32_t* pair = pairs + (int64_t(y) * s.row() + x) / 2 * s.out + c;
                _mm512_storeu_si512(pair, each[0] | each[1]);
                _mm512_storeu_si512(pair + row / 2, each[2] | each[3]);
                const __mmask16 some = _mm512_cmpneq_epi32_mask(place, _mm512_set1_epi32(NONE));
                store(biases + c, load(biases + c) + Floats(_mm512_maskz_mov_epi32(some, upper)));
                if (padded) {
                    uint16_t* to = padded + (y + s.reach()) * row + int64_t(x + s.reach()) * s.out + c;
                    narrow(each[0], to);
                    narrow(_mm512_srli_epi32(each[1], 16), to + s.out);
                    narrow(each[2], to + row);
                    narrow(_mm512_srli_epi32(each[3], 16), to + row + s.out);
                }
            }
}

// places [length, in] of many channels to [in, length], of which `length` is a multiple of 2 EDGE
static void turn(int length, int in, const uint16_t* from, uint16_t* to, int stride) {
    for (int p = 0; p < length; p += 2 * EDGE)
        for (int c = 0; c < in; c += 2 * EDGE) {
            __m512i first[EDGE], second[EDGE];  // then rows are two channels, of EDGE places each
            for (int j = 0; j < EDGE; j++) {
                first[j] = _mm512_loadu_si512(from + int64_t(p + j) * in + c);
                second[j] = _mm512_loadu_si512(from + int64_t(p + EDGE + j) * in + c);
            }
            transpose(first);
            transpose(second);
            for (int j = 0; j < EDGE; j++) {
                uint16_t* even = to + int64_t(c + 2 * j) * stride + p;
                narrow(first[j], even);
                narrow(second[j], even + EDGE);
                narrow(_mm512_srli_epi32(first[j], 16), even + stride);
                narrow(_mm512_srli_epi32(second[j], 16), even + stride + EDGE);
            }
        }
}

// The same pairs with the place before: from (p, p + 1), (p + 2, p + 3), … to (p - 1, p), (p + 1, p + 2), …
static void shift(int64_t pairs, int columns, const uint32_t* from, uint32_t* to) {
    for (int64_t j = 0; j < pairs * columns; j += EDGE) {
        const __m512i before = _mm512_loadu_si512(from + j - columns), here = _mm512_loadu_si512(from + j);
        _mm512_storeu_si512(to + j, _mm512_srli_epi32(before, 16) | _mm512_slli_epi32(here, 16));
    }
}

// sums [2 EDGE, columns], two tiles of rows, += over images and places, left · pairs. A row of a tile is
// `stride` further than the last, the second tile `lower`; images are `next_left` and `next_pairs` apart.
static void sum_places(int num, int places, const uint16_t* left, int64_t lower, int64_t stride,
                       int64_t next_left, const uint32_t* pairs, int64_t next_pairs, int columns,
                       float* sums, int64_t lower_sums) {
    for (int n = 0; n < columns; n += COLUMNS) {
        float *to = sums + n, *below = to + lower_sums;
        _tile_loadd(0, to, 4 * columns);
        _tile_loadd(1, to + EDGE, 4 * columns);
        _tile_loadd(2, below, 4 * columns);
        _tile_loadd(3, below + EDGE, 4 * columns);
        for (int m = 0; m < num; m++) {
            const uint16_t* a = left + m * next_left;
            const uint32_t* right = pairs + m * next_pairs + n;
            for (int p = 0; p < places; p += 2 * EDGE, right += int64_t(EDGE) * columns) {
                _tile_loadd(4, a + p, 2 * stride);
                _tile_loadd(6, right, 4 * columns);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + EDGE, 4 * columns);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + lower + p, 2 * stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, to, 4 * columns);
        _tile_stored(1, to + EDGE, 4 * columns);
        _tile_stored(2, below, 4 * columns);
        _tile_stored(3, below + EDGE, 4 * columns);
    }
}

// From into [num, height / 2, width / 2, out] = ∂ℓ/∂pooled, and the rest as `forward` had it: onward [num,
// height, width, in] = ∂ℓ/∂images unless it is null, and kernel and bias with `factor` times their gradients
// added.
static void backward(int64_t num, const Shape& s, const uint16_t* images, const uint16_t* into,
                     const uint8_t* which, float factor, uint16_t* onward, float* kernel, float* bias) {
    Rooms& rooms = rooms_of();
    TileShapes shapes;
    const bool one = s.in == 1;  // then rows of tiles are places of the kernel's row instead of channels
    const int length = s.length(), across = one ? EDGE : s.kernel * s.in;  // of the sums of a kernel's row
    // Tiles of an image start on lines of the cache wherever the kernel is, so those of its pairs start
    // where they may, in zeros before the first or, at odd distances, among `odd` pairs.
    const int64_t margin = int64_t(MARGIN) * s.out;
    const int64_t pairs_of_image = int64_t(s.places()) / 2 * s.out + margin;
    const int64_t image_size = s.padded(s.in), turned_size = one ? image_size : int64_t(length) * s.in;
    uint16_t* padded = zeros(rooms.images, one ? GROUP * image_size : image_size);
    uint16_t* turned = one ? padded : of(rooms.turned, GROUP * turned_size);
    uint32_t* pairs = zeros(rooms.pairs, (one ? 1 : 2) * (GROUP * pairs_of_image + margin)) + margin;
    uint32_t* odd = pairs + GROUP * pairs_of_image + margin;
    float* sums = zeros(rooms.sums, int64_t(s.kernel + 1) * across * s.out);
    float* biases = zeros(rooms.biases, s.out);
    uint16_t* gradient = onward ? zeros(rooms.gradients, s.padded(s.out)) : nullptr;
    const uint16_t* packed = onward ? pack_kernel<true>(s, kernel, rooms.panel) : nullptr;
    written();
    shapes.rows(EDGE);
    const int64_t size = int64_t(s.height) * s.width, pooled = size / 4 * s.out;
    for (int64_t start = 0; start < num; start += GROUP) {
        const int some = num - start < GROUP ? int(num - start) : GROUP;
        for (int g = 0; g < some; g++) {
            const int64_t m = start + g;
            pad(s, images + m * size * s.in, padded + (one ? g * image_size : 0));
            if (!one) turn(length, s.in, padded, turned + g * turned_size, length);
            spread(s, into + m * pooled, which + m * pooled, pairs + g * pairs_of_image, gradient,
                   biases);
            if (!one)
                shift(s.places() / 2, s.out, pairs + g * pairs_of_image, odd + g * pairs_of_image);
            written();
            if (onward)
                convolve(s, s.out, gradient, packed, s.in, rooms.results,
                         [&](int y, int n, const float* upper, const float* lower) {
                             uint16_t* to = onward + (m * size + int64_t(y) * s.width) * s.in + n;
                             for (int x = 0; x < s.width; x++)
                                 for (int j = 0; j < COLUMNS; j += EDGE) {
                                     narrow(load(upper + x * COLUMNS + j), to + int64_t(x) * s.in + j);
                                     narrow(load(lower + x * COLUMNS + j),
                                            to + int64_t(s.width + x) * s.in + j);
                                 }
                         });
        }
        for (int dy = 0; one && dy < s.kernel; dy += 2)
            sum_places(some, s.places(), padded + dy * s.row(), s.row(), 1, image_size, pairs,
                       pairs_of_image, s.out, sums + int64_t(dy) * across * s.out, EDGE * s.out);
        for (int tap = 0; !one && tap < s.kernel * s.kernel; tap++) {
            // A place of the image meets the one of the gradient that lies `apart` before.
            const int apart = tap / s.kernel * s.row() + tap % s.kernel, first = apart / LINE * LINE;
            const int last = apart + (s.height - 1) * s.row() + s.width;
            const uint32_t* right =
                (apart % 2 ? odd : pairs) + int64_t(first - apart + apart % 2) / 2 * s.out;
            for (int c = 0; c < s.in; c += 2 * EDGE)
                sum_places(some, last - first, turned + int64_t(c) * length + first, EDGE * length, length,
                           turned_size, right, pairs_of_image, s.out,
                           sums + int64_t(tap * s.in + c) * s.out, EDGE * s.out);
        }
        written();
    }
    step(s, sums, across, factor, kernel);
    for (int c = 0; c < s.out; c++) bias[c] += factor * biases[c];
}

extern "C" {

int prepare() { return may_use_tiles(); }  // whether the next two may be called

void forward_pooled(int64_t num, int height, int width, int in, int out, int kernel,
                    const uint16_t* images, const float* weight, const float* bias, uint16_t* pooled,
                    uint8_t* which) {
    forward(num, {height, width, in, out, kernel}, images, weight, bias, pooled, which);
}

void backward_pooled(int64_t num, int height, int width, int in, int out, int kernel,
                     const uint16_t* images, const uint16_t* into, const uint8_t* which, float factor,
                     uint16_t* onward, float* weight, float* bias) {
    backward(num, {height, width, in, out, kernel}, images, into, which, factor, onward, weight, bias);
}

}  // extern "C"

#endif
