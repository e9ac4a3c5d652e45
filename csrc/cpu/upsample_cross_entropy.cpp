// Cross-entropy of bilinearly resized scores, and its gradient at the scores' own resolution.
//
// Tasks are bands of full-size rows. A band is processed strip by strip: a strip's two source rows are
// interpolated along the row once and used for every full-size row between them; the gradient takes the same
// way back, added over rows first and then, once per source row, over columns. Contributions to a source row
// that two bands read are added at the end. Bands and strips do not depend on the number of threads.
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../common/buffers.h"
#include "dtypes.h"
#include "exp.h"
#include "gather.h"
#include "log.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Pixels of a strip: its data, four floats per class and pixel, fits in L1 with 19 classes.
constexpr int kVectors = 4;
constexpr int64_t kStrip = kVectors * kLanes;

// Full-size rows of a band: at a scale of 8 one source row in four belongs to two bands.
constexpr int64_t kBandRows = 32;

constexpr int32_t kIgnored = -1, kUnknown = -2;

// Source rows [first, last) that a band reads; `at`: number of such rows in all bands before it.
struct Band {
    int64_t first, last, at;
};

struct Shared {
    const UpsampleCrossEntropy& a;
    ColumnTaps taps;
    Supports columns;
    std::vector<Band> bands;
    float* partial;       // n, rows of all bands, c, w; null without gradient
    const float* smooth;  // for each class label_smoothing / c, times its weight
    float smooth_total;
};

// A source row's data for a strip: its scores, interpolated along the row, and its gradient; c x kStrip.
struct Row {
    int64_t index;
    float *scores, *sums;
};

// A strip of full-size pixels [begin, end), of source columns [low, high).
struct Strip {
    int64_t begin, end, low, high;
};

template <typename T>
void resize_row(const Shared& s, const T* scores, const Strip& strip, float* transposed, float* out) {
    const Resize& a = s.a.resize;
    const int64_t stride = blended_stride(a);
    for (int64_t x = strip.low; x < strip.high; ++x) {
        for (int64_t k = 0; k < a.c; ++k) transposed[k * stride + x] = load_one(scores + x * a.c + k);
    }
    for (int64_t at = strip.begin; at < strip.end; at += kLanes) {
        const Columns& column = s.taps.columns[at / kLanes];
        for (int64_t k = 0; k < a.c; ++k) {
            store(out + k * kStrip + at - strip.begin,
                  resize_columns(transposed + k * stride, column, s.taps.first + at, s.taps.next + at));
        }
    }
}

// Adds a row's gradient, over columns, to the band's.
void add_columns(const Shared& s, const Strip& strip, const float* sums, float* out) {
    const int64_t c = s.a.resize.c, w = s.a.resize.w;
    for (int64_t k = 0; k < c; ++k) {
        for (int64_t x = strip.low; x < strip.high; ++x) {
            const Support& support = s.columns.of[x];
            const int64_t end = support.begin + support.count;
            const int64_t from = support.begin > strip.begin ? support.begin : strip.begin;
            const int64_t to = end < strip.end ? end : strip.end;
            const float* weights = s.columns.weights + support.at - support.begin;
            const float* row = sums + k * kStrip - strip.begin;
            float total = 0;
            for (int64_t i = from; i < to; ++i) total += row[i] * weights[i];
            out[k * w + x] += total;
        }
    }
}

// Labels of kLanes pixels from index `at`, of which `count` exist: classes, kIgnored or kUnknown.
vi labels(const UpsampleCrossEntropy& a, int64_t at, int64_t count) {
    const int32_t classes = static_cast<int32_t>(a.resize.c);
    vi label = vi{} + kIgnored;
    if (a.wide_target) {
        const int64_t* target = static_cast<const int64_t*>(a.target) + at;
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t l = target[lane];
            if (l != a.ignore_index) {
                label[lane] = l >= 0 && l < classes ? static_cast<int32_t>(l) : kUnknown;
            }
        }
        return label;
    }
    uint8_t bytes[kLanes] = {};
    std::memcpy(bytes, static_cast<const uint8_t*>(a.target) + at, static_cast<size_t>(count));
    label = __builtin_convertvector(load_vector<vb>(bytes), vi);
    const bool possible = a.ignore_index >= 0 && a.ignore_index < 256;
    const vi ignored = label == (vi{} + (possible ? static_cast<int32_t>(a.ignore_index) : -1));
    label = label < classes ? label : vi{} + kUnknown;
    label = ignored ? vi{} + kIgnored : label;
    for (int64_t lane = count; lane < kLanes; ++lane) label[lane] = kIgnored;
    return label;
}

bool any(vi mask) {
    int32_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all |= mask[lane];
    return all != 0;
}

// The weight of kLanes pixels' losses: that of the class, 0 for ignored pixels.
vf weights(const UpsampleCrossEntropy& a, vi label) {
    if (a.weight == nullptr) return label >= 0 ? splat(1.0f) : splat(0.0f);
    vf weight = {};
    for (int lane = 0; lane < kLanes; ++lane) {
        if (label[lane] >= 0) weight[lane] = a.weight[label[lane]];
    }
    return weight;
}

// The fraction of each pixel's loss that hard example mining keeps.
vf kept(const UpsampleCrossEntropy& a, int64_t at, int64_t count) {
    if (a.kept_of == nullptr) return splat(1.0f);
    float lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < count ? a.kept_of[at + lane] : -1;
    const vf loss = load(lanes), cutoff = splat(a.cutoff);
    // NaN, which fails every comparison, is kept.
    return loss == cutoff ? splat(a.share) : (loss < cutoff ? splat(0.0f) : splat(1.0f));
}

// kLanes adjacent pixels: their position in the strip and in the target, and how many exist.
struct Place {
    int64_t in_strip, at, count;
};

// The two source rows of a full-size row, and the weight of the lower one. `values`: c x kLanes.
struct Pair {
    Row upper, lower;
    float fraction;
    float* values;
};

struct Sums {
    vf loss = {}, weight = {};
};

// Writes the scores of all classes to values; returns each pixel's maximum.
vf blend_pair(const Shared& s, const Pair& pair, int64_t in_strip) {
    vf greatest = splat(-std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < s.a.resize.c; ++k) {
        const int64_t at = k * kStrip + in_strip;
        const vf value =
            blend(load(pair.upper.scores + at), load(pair.lower.scores + at), splat(pair.fraction));
        store(pair.values + k * kLanes, value);
        greatest = value > greatest ? value : greatest;
    }
    return greatest;
}

vf of_label(const float* values, vi label) {
    vf value = {};
    for (int lane = 0; lane < kLanes; ++lane) {
        if (label[lane] >= 0) value[lane] = values[label[lane] * kLanes + lane];
    }
    return value;
}

// Replaces values by their exponentials; returns their sum, and the smoothing term of the loss without its
// logarithm.
std::pair<vf, vf> exponentials(const Shared& s, float* values, vf greatest) {
    vf sum = {}, even = {};
    for (int64_t k = 0; k < s.a.resize.c; ++k) {
        const vf below = load(values + k * kLanes) - greatest, value = exp(below);
        store(values + k * kLanes, value);
        sum += value;
        even -= below * splat(s.smooth[k]);
    }
    return {sum, even};
}

// Adds factor * exponential - smooth, and at the label - hard, to the rows' sums.
void add_gradient(const Shared& s, const Pair& pair, int64_t in_strip, vi label, vf factor, vf hard,
                  vf part) {
    const vf below = splat(pair.fraction), above = 1 - below;
    for (int64_t k = 0; k < s.a.resize.c; ++k) {
        vf gradient = load(pair.values + k * kLanes) * factor - part * splat(s.smooth[k]);
        gradient = label == static_cast<int32_t>(k) ? gradient - hard : gradient;
        float* upper = pair.upper.sums + k * kStrip + in_strip;
        store(upper, load(upper) + gradient * above);
        if (pair.fraction == 0) continue;
        float* lower = pair.lower.sums + k * kStrip + in_strip;
        store(lower, load(lower) + gradient * below);
    }
}

void keep(const UpsampleCrossEntropy& a, const Place& place, vf loss) {
    if (a.losses == nullptr) return;
    std::memcpy(a.losses + place.at, &loss, static_cast<size_t>(place.count) * 4);
}

void make_pixels(const Shared& s, const Pair& pair, const Place& place, vi label, Sums& sums) {
    const vi labelled = label >= 0;
    const vf part = labelled ? kept(s.a, place.at, place.count) : splat(0.0f);
    if (!any(part != splat(0.0f))) return keep(s.a, place, splat(-1.0f));
    const vf weight = weights(s.a, label), hard = weight * splat(1 - s.a.label_smoothing);
    const vf greatest = blend_pair(s, pair, place.in_strip), shown = of_label(pair.values, label);
    const auto [sum, even] = exponentials(s, pair.values, greatest);
    const vf all = hard + splat(s.smooth_total);
    const vf loss = hard * (greatest - shown) + even + all * log(sum);
    sums.loss += labelled ? loss : splat(0.0f);
    sums.weight += weight;
    keep(s.a, place, labelled ? loss : splat(-1.0f));
    if (s.partial == nullptr) return;
    add_gradient(s, pair, place.in_strip, label, part * all / sum, part * hard, part);
}

// Results of a task: sums in double, and the index of its first pixel with an unknown label, -1 if none.
struct Found {
    double loss = 0, weight = 0;
    int64_t unknown = -1;

    void add(const Sums& sums) {
        for (int lane = 0; lane < kLanes; ++lane) {
            loss += static_cast<double>(sums.loss[lane]);
            weight += static_cast<double>(sums.weight[lane]);
        }
    }

    void note_unknown(vi label, int64_t at) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (label[lane] == kUnknown && (unknown < 0 || at + lane < unknown)) unknown = at + lane;
        }
    }
};

// One band of one image.
template <typename T>
class Task {
   public:
    Task(const Shared& s, int64_t n, int64_t band) : s_(s), a_(s.a.resize), n_(n), band_(s.bands[band]) {
        const int64_t floats = a_.c * kStrip, transposed = a_.c * blended_stride(a_);
        float* memory = static_cast<float*>(thread_scratch(2, (4 * floats + a_.c * kLanes + transposed) * 4));
        pair_.upper = {-1, memory, memory + floats};
        pair_.lower = {-1, memory + 2 * floats, memory + 3 * floats};
        pair_.values = memory + 4 * floats;
        transposed_ = pair_.values + a_.c * kLanes;
        if (s.partial == nullptr) return;
        const int64_t row = a_.c * a_.w, rows = band_.last - band_.first;
        out_ = s.partial +
               (n * (s.bands.back().at + s.bands.back().last - s.bands.back().first) + band_.at) * row;
        std::memset(out_, 0, static_cast<size_t>(rows * row) * 4);
    }

    Found run(int64_t begin, int64_t end) {
        Found found;
        for (int64_t x = 0; x < a_.out_w; x += kStrip) {
            const int64_t last = x + kStrip < a_.out_w ? x + kStrip : a_.out_w;
            strip_ = {x, last, s_.taps.first[x], s_.taps.next[last - 1] + 1};
            Sums sums;
            for (int64_t y = begin; y < end; ++y) make_row(y, sums, found);
            leave(pair_.upper);
            leave(pair_.lower);
            found.add(sums);
        }
        return found;
    }

   private:
    void make_row(int64_t y, Sums& sums, Found& found) {
        const Tap t = tap(y, a_.h, a_.full_h, a_.align_corners);
        if (pair_.lower.index == t.first) std::swap(pair_.upper, pair_.lower);
        enter(pair_.upper, t.first);
        pair_.fraction = t.next == t.first ? 0 : t.fraction;
        if (pair_.fraction > 0) enter(pair_.lower, t.next);
        // A row with weight 0 may contain non-finite values.
        Pair pair = pair_;
        if (pair.fraction == 0) pair.lower = pair.upper;
        for (int64_t x = strip_.begin; x < strip_.end; x += kLanes) {
            const int64_t at = (n_ * a_.out_h + y) * a_.out_w + x;
            const Place place = {x - strip_.begin, at, x + kLanes < strip_.end ? kLanes : strip_.end - x};
            const vi label = labels(s_.a, place.at, place.count);
            if (any(label == kUnknown)) found.note_unknown(label, at);
            make_pixels(s_, pair, place, label, sums);
        }
    }

    void enter(Row& row, int64_t index) {
        if (row.index == index) return;
        leave(row);
        row.index = index;
        const T* scores = static_cast<const T*>(a_.scores) + (n_ * a_.h + index) * a_.w * a_.c;
        resize_row(s_, scores, strip_, transposed_, row.scores);
        if (out_ != nullptr) std::memset(row.sums, 0, static_cast<size_t>(a_.c * kStrip) * 4);
    }

    void leave(Row& row) {
        if (row.index >= 0 && out_ != nullptr) {
            add_columns(s_, strip_, row.sums, out_ + (row.index - band_.first) * a_.c * a_.w);
        }
        row.index = -1;
    }

    const Shared& s_;
    const Resize& a_;
    int64_t n_;
    Band band_;
    Pair pair_;
    Strip strip_ = {};
    float *transposed_, *out_ = nullptr;
};

std::vector<Band> make_bands(const Resize& a) {
    std::vector<Band> bands;
    int64_t at = 0;
    for (int64_t y = 0; y < a.out_h; y += kBandRows) {
        const int64_t end = y + kBandRows < a.out_h ? y + kBandRows : a.out_h;
        const Band band = {tap(y, a.h, a.full_h, a.align_corners).first,
                           tap(end - 1, a.h, a.full_h, a.align_corners).next + 1, at};
        at += band.last - band.first;
        bands.push_back(band);
    }
    return bands;
}

// Adds the bands' contributions to every source row, in order.
void add_bands(const Shared& s, int64_t rows, float* gradient) {
    const Resize& a = s.a.resize;
    parallel_for(a.threads, a.n * a.h, [&](int64_t task) {
        const int64_t n = task / a.h, y = task % a.h;
        for (int64_t k = 0; k < a.c; ++k) {
            float* out = gradient + ((n * a.c + k) * a.h + y) * a.w;
            std::memset(out, 0, static_cast<size_t>(a.w) * 4);
            for (const Band& band : s.bands) {
                if (y < band.first || y >= band.last) continue;
                const float* part = s.partial + ((n * rows + band.at + y - band.first) * a.c + k) * a.w;
                for (int64_t x = 0; x < a.w; ++x) out[x] += part[x];
            }
        }
    });
}

template <typename T>
CrossEntropySums run(const UpsampleCrossEntropy& args) {
    const Resize& a = args.resize;
    const std::vector<Band> bands = make_bands(a);
    const int64_t count = static_cast<int64_t>(bands.size());
    const int64_t rows = bands.back().at + bands.back().last - bands.back().first;
    const int64_t floats = args.gradient ? a.n * rows * a.c * a.w : 0;
    const Buffer partial(static_cast<size_t>(floats + 1) * 4);
    std::vector<float> smooth(static_cast<size_t>(a.c));
    float smooth_total = 0;
    for (int64_t k = 0; k < a.c; ++k) {
        smooth[k] = args.label_smoothing / static_cast<float>(a.c) * (args.weight ? args.weight[k] : 1);
        smooth_total += smooth[k];
    }
    const Shared s = {args,
                      make_column_taps(a, 0),
                      make_supports(1, a.w, a.full_w, a.out_w, a.align_corners),
                      bands,
                      args.gradient ? static_cast<float*>(partial.data()) : nullptr,
                      smooth.data(),
                      smooth_total};
    std::vector<Found> found(static_cast<size_t>(a.n * count));
    parallel_for(a.threads, a.n * count, [&](int64_t task) {
        const int64_t begin = task % count * kBandRows, end = begin + kBandRows;
        found[task] = Task<T>(s, task / count, task % count).run(begin, end < a.out_h ? end : a.out_h);
    });
    if (args.gradient) add_bands(s, rows, args.gradient);
    CrossEntropySums sums = {0, 0, -1};
    for (const Found& of_task : found) {
        sums.loss += of_task.loss;
        sums.weight += of_task.weight;
        if (sums.unknown < 0) sums.unknown = of_task.unknown;
    }
    return sums;
}

}  // namespace

CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropy& args) {
    return with_type<float, bf16>(args.resize.dtype, [&](auto t) { return run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
