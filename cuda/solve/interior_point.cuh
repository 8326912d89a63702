// An interior point method for the same split, on one block in double precision: the classic way, kept for comparison and as a cross-check.
//
// With C tokens of a bundle, b single-place tokens of a rank: minimise t over x >= 0, s >= 0 with sum_r x[u,r] = C[u] and
// b[r] + sum_u x[u,r] + s[r] = t. Duals p >= 0 with sum p = 1, z[u,r] = p[r] - y[u] >= 0. Eliminating dx, ds and dy from a Newton step
// leaves K dp = h - dt 1, 1'dp = 1 - sum p, with th = x / z, sig = s / p, Th[u] = sum_r th[u,r] and
// K = diag(sig) + sum_u (diag(th_u) - th_u th_u' / Th[u]), symmetric and positive definite, one row a rank. Predictor and corrector
// (Mehrotra) share its factors. No big constants, no fixed number of steps: the start is feasible, and the loop ends when primal and dual
// are less than half a token apart.
//
// The real split is then rounded, by largest remainder, so that every bundle keeps its tokens. The reported bound is a cut of integers: the
// best of the sets {r : p[r] >= p[q]}, which hold the critical ranks, so it needs no trust in floating point.
#pragma once

#include "space.cuh"

namespace lplb {

// Doubles in shared memory.
struct IpmSpace {
    double *x, *best_x, *z, *inverse_z, *th, *corrector;  // [arcs]
    double *inverse_sum, *push, *dy;  // [bundles]
    double *p, *best_p, *inverse_p, *s, *sig, *h, *ones, *dp, *corrector_s, *inverse_pivot;  // [ranks]
    double *matrix;  // [ranks][ranks + 1]
    double *partial;  // [3][16]

    __host__ __device__ static int64_t doubles_of(const lplbk_shape &shape) {
        const int64_t n = shape.group_size;
        return 6ll * shape.max_arcs + 3ll * shape.max_bundles + 10 * n + n * (n + 1) + 48;
    }
    __device__ IpmSpace(double *memory, const lplbk_shape &shape) {
        const auto section = [&memory](int n) {
            double *start = memory;
            memory += n;
            return start;
        };
        const int n = shape.group_size;
        x = section(shape.max_arcs), z = section(shape.max_arcs), inverse_z = section(shape.max_arcs), th = section(shape.max_arcs);
        corrector = section(shape.max_arcs), best_x = section(shape.max_arcs);
        inverse_sum = section(shape.max_bundles), push = section(shape.max_bundles), dy = section(shape.max_bundles);
        p = section(n), inverse_p = section(n), s = section(n), sig = section(n), h = section(n), ones = section(n), dp = section(n);
        corrector_s = section(n), inverse_pivot = section(n), best_p = section(n);
        matrix = section(n * (n + 1));
        partial = section(48);
    }
};

class InteriorPoint {
public:
    FlowEnd end;
    bool in_witness;  // this thread's rank
    int total;
    int max_load;

    __device__ InteriorPoint(const Image &tables, const FlowSpace &space, const IpmSpace &real, int n_ranks)
        : t_(tables), f_(space), r_(real), n_(n_ranks), rank_(threadIdx.x), valid_(threadIdx.x < n_ranks) {}

    // By the whole block, at least one thread a rank; sums and base are set, a barrier has been. Leaves space.x.
    __device__ void solve() {
        double tokens = valid_ ? f_.base[rank_] : 0;
        for (int u = threadIdx.x; u < t_.n_bundles(); u += blockDim.x) tokens += f_.sum[u];
        total = (int)sum(tokens);
        scale_ = max((double)total / n_, 1.0);
        end.rounds = 0;
        start();
        while (!close_enough() && end.rounds < kMaxSteps) {
            ++end.rounds;
            step();
        }
        restore();
        round_off();
        cut();
    }

private:
    static constexpr int kMaxSteps = 60;
    static constexpr double kTokensApart = 0.45;
    static constexpr double kStep = 0.995;  // of the way to the boundary

    const Image &t_;
    const FlowSpace &f_;
    const IpmSpace &r_;
    const int n_;
    const int rank_;
    const bool valid_;
    double scale_;  // tokens in one unit of x, s and t
    double t_value_;  // t
    double n_pairs_;  // of complementary variables
    double best_peak_ = 1e300, best_bound_ = -1e300;  // in tokens, of best_x and best_p

    // ---- Reductions, in a fixed order, so that equal inputs give equal bits

    template <int kValues, class Join>
    __device__ void across(double (&values)[kValues], Join join) {
#pragma unroll 1
        for (int step = 16; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) values[i] = join(values[i], __shfl_xor_sync(kFullWarp, values[i], step));
        }
        if (lane_id() == 0) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) r_.partial[16 * i + warp_id()] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kValues; ++i) values[i] = r_.partial[16 * i];
#pragma unroll 1
        for (int w = 1; w < (int)blockDim.x / 32; ++w) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) values[i] = join(values[i], r_.partial[16 * i + w]);
        }
        __syncthreads();
    }
    template <int kValues>
    __device__ void sum(double (&values)[kValues]) {
        across(values, [](double a, double b) { return a + b; });
    }
    __device__ double sum(double value) {
        double values[1] = {value};
        sum(values);
        return values[0];
    }
    __device__ double highest(double value) {
        double values[1] = {value};
        across(values, [](double a, double b) { return a > b ? a : b; });
        return values[0];
    }
    template <int kValues>
    __device__ void lowest(double (&values)[kValues]) {
        across(values, [](double a, double b) { return a < b ? a : b; });
    }

    // ---- One direction. x == 0 marks the arcs of bundles without tokens, which take no part.

    __device__ double gain(int arc, double centre) const {
        return r_.x[arc] > 0 ? (centre - r_.corrector[arc]) * r_.inverse_z[arc] - r_.x[arc] : 0.0;
    }
    __device__ double gain_s(int rank, double centre) const { return (centre - r_.corrector_s[rank]) * r_.inverse_p[rank] - r_.s[rank]; }

    struct Change {
        double primal, dual;
    };
    __device__ Change change(int arc, int bundle, double centre) const {
        const double dual = r_.dp[t_.arc_rank[arc]] - r_.dy[bundle];
        return {gain(arc, centre) - r_.th[arc] * dual, dual};
    }
    __device__ Change change_s(double centre) const { return {gain_s(rank_, centre) - r_.sig[rank_] * r_.dp[rank_], r_.dp[rank_]}; }

    __device__ void start() {
        double peak = 0, pairs = valid_ ? 1 : 0;
        const int n_arcs = t_.n_arcs();
        for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
            const ArcEntry entry{t_.rank_arc[i]};
            const int arc = entry.arc(), bundle = entry.bundle();
            const int degree = t_.bundle_start[bundle + 1] - t_.bundle_start[bundle];
            r_.x[arc] = f_.sum[bundle] / scale_ / degree;
            r_.z[arc] = 1.0 / n_;
            pairs += f_.sum[bundle] > 0 ? 1 : 0;
        }
        n_pairs_ = sum(pairs);
        if (valid_) {
            r_.p[rank_] = 1.0 / n_;
            peak = load_of_rank();
        }
        t_value_ = 1.1 * highest(peak);
        if (valid_) r_.s[rank_] = t_value_ - peak;
        __syncthreads();
    }

    __device__ double load_of_rank() const {
        double load = f_.base[rank_] / scale_;
        for (int i = t_.rank_start[rank_]; i < t_.rank_start[rank_ + 1]; ++i) load += r_.x[ArcEntry{t_.rank_arc[i]}.arc()];
        return load;
    }

    // The busiest rank against the bound b.p + sum C min p over sum p, each the best so far: beyond nine digits the matrix is too near to a
    // singular one, and a step can lead astray. Then no step is better than another one.
    __device__ bool close_enough() {
        if (total == 0) return true;
        const double peak = scale_ * highest(valid_ ? load_of_rank() : 0.0);
        double value = valid_ ? f_.base[rank_] * r_.p[rank_] : 0.0;
        for (int u = threadIdx.x; u < t_.n_bundles(); u += blockDim.x) value += f_.sum[u] * lowest_price(u);
        double sums[2] = {value, valid_ ? r_.p[rank_] : 0.0};
        sum(sums);
        const double bound = sums[0] / sums[1];
        const double apart = best_peak_ - best_bound_;
        if (peak < best_peak_) {
            best_peak_ = peak;
            for (int arc = threadIdx.x; arc < t_.n_arcs(); arc += blockDim.x) r_.best_x[arc] = r_.x[arc];
        }
        if (bound > best_bound_) {
            best_bound_ = bound;
            if (valid_) r_.best_p[rank_] = r_.p[rank_];
        }
        const double now = best_peak_ - best_bound_;
        return now < kTokensApart || (now > 0.9 * apart && now < kStalled * best_peak_);
    }
    static constexpr double kStalled = 1e-4;

    __device__ void restore() {
        if (total == 0) return;
        for (int arc = threadIdx.x; arc < t_.n_arcs(); arc += blockDim.x) r_.x[arc] = r_.best_x[arc];
        if (valid_) r_.p[rank_] = r_.best_p[rank_];
        __syncthreads();
    }
    __device__ double lowest_price(int bundle) const {
        double price = 1e300;
        for (int arc = t_.bundle_start[bundle]; arc < t_.bundle_start[bundle + 1]; ++arc) {
            price = r_.p[t_.arc_rank[arc]] < price ? r_.p[t_.arc_rank[arc]] : price;
        }
        return price;
    }

    __device__ void step() {
        const int n_arcs = t_.n_arcs(), n_bundles = t_.n_bundles();
        double product = valid_ ? r_.s[rank_] * r_.p[rank_] : 0.0;
        for (int arc = threadIdx.x; arc < n_arcs; arc += blockDim.x) {
            product += r_.x[arc] * r_.z[arc];
            r_.inverse_z[arc] = 1.0 / r_.z[arc];
            r_.th[arc] = r_.x[arc] * r_.inverse_z[arc];
            r_.corrector[arc] = 0;
        }
        if (valid_) {
            r_.inverse_p[rank_] = 1.0 / r_.p[rank_];
            r_.sig[rank_] = r_.s[rank_] * r_.inverse_p[rank_];
            r_.corrector_s[rank_] = 0;
            r_.ones[rank_] = 1;
        }
        const double gap = sum(product) / n_pairs_;
        for (int u = threadIdx.x; u < n_bundles; u += blockDim.x) {
            double held = 0;
            for (int arc = t_.bundle_start[u]; arc < t_.bundle_start[u + 1]; ++arc) held += r_.th[arc];
            r_.inverse_sum[u] = held > 0 ? 1.0 / held : 0.0;
        }
        __syncthreads();
        build();
        factor();
        double dt = direction(0.0, true);
        const Lengths far = lengths(0.0);
        double left = valid_ ? (r_.s[rank_] + far.primal * change_s(0.0).primal) * (r_.p[rank_] + far.dual * change_s(0.0).dual) : 0.0;
        for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
            const ArcEntry entry{t_.rank_arc[i]};
            const int arc = entry.arc();
            if (!(r_.x[arc] > 0)) continue;
            const Change at = change(arc, entry.bundle(), 0.0);
            left += (r_.x[arc] + far.primal * at.primal) * (r_.z[arc] + far.dual * at.dual);
        }
        const double gap_left = sum(left) / n_pairs_;
        const double ratio = gap_left / gap;
        const double centre = ratio * ratio * ratio * gap;
        for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
            const ArcEntry entry{t_.rank_arc[i]};
            const Change at = change(entry.arc(), entry.bundle(), 0.0);
            r_.corrector[entry.arc()] = at.primal * at.dual;
        }
        if (valid_) {
            const Change at = change_s(0.0);
            r_.corrector_s[rank_] = at.primal * at.dual;
        }
        __syncthreads();
        dt = direction(centre, false);
        const Lengths near = lengths(centre);
        const double primal = min(kStep * near.primal, 1.0), dual = min(kStep * near.dual, 1.0);
        Change at_s{0, 0};
        if (valid_) at_s = change_s(centre);
        for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
            const ArcEntry entry{t_.rank_arc[i]};
            const int arc = entry.arc();
            if (!(r_.x[arc] > 0)) continue;
            const Change at = change(arc, entry.bundle(), centre);
            r_.x[arc] = max(r_.x[arc] + primal * at.primal, kTiny);
            r_.z[arc] = max(r_.z[arc] + dual * at.dual, kTiny);
        }
        __syncthreads();
        if (valid_) {
            r_.s[rank_] = max(r_.s[rank_] + primal * at_s.primal, kTiny);
            r_.p[rank_] = max(r_.p[rank_] + dual * at_s.dual, kTiny);
        }
        t_value_ += primal * dt;
        __syncthreads();
    }
    static constexpr double kTiny = 1e-200;

    __device__ void build() {
        if (valid_) {
            double *row = r_.matrix + rank_ * (n_ + 1);
            for (int q = 0; q < n_; ++q) row[q] = 0;
            row[rank_] = r_.sig[rank_];
            for (int i = t_.rank_start[rank_]; i < t_.rank_start[rank_ + 1]; ++i) {
                const ArcEntry entry{t_.rank_arc[i]};
                const double th = r_.th[entry.arc()];
                const double share = th * r_.inverse_sum[entry.bundle()];
                row[rank_] += th;
                for (int arc = t_.bundle_start[entry.bundle()]; arc < t_.bundle_start[entry.bundle() + 1]; ++arc) {
                    row[t_.arc_rank[arc]] -= share * r_.th[arc];
                }
            }
        }
        __syncthreads();
    }

    // L D L' in place; columns keep their pivot's factor.
    __device__ void factor() {
        const int n_warps = blockDim.x / 32;
        for (int k = 0; k < n_; ++k) {
            const double inverse = 1.0 / max(r_.matrix[k * (n_ + 1) + k], 1e-30);
            if (threadIdx.x == 0) r_.inverse_pivot[k] = inverse;
            for (int i = k + 1 + warp_id(); i < n_; i += n_warps) {
                double *row = r_.matrix + i * (n_ + 1);
                const double share = row[k] * inverse;
                for (int j = k + 1 + lane_id(); j <= i; j += 32) row[j] -= share * r_.matrix[j * (n_ + 1) + k];
            }
            __syncthreads();
        }
    }

    // v = inverse(K) v. By one warp.
    __device__ void back_solve(double *v) {
        for (int k = 0; k < n_; ++k) {
            const double share = v[k] * r_.inverse_pivot[k];
            for (int i = k + 1 + lane_id(); i < n_; i += 32) v[i] -= r_.matrix[i * (n_ + 1) + k] * share;
            __syncwarp();
        }
        for (int k = lane_id(); k < n_; k += 32) v[k] *= r_.inverse_pivot[k];
        __syncwarp();
        for (int k = n_ - 1; k > 0; --k) {
            const double known = v[k];
            for (int i = lane_id(); i < k; i += 32) v[i] -= r_.matrix[k * (n_ + 1) + i] * r_.inverse_pivot[i] * known;
            __syncwarp();
        }
    }

    // Leaves dp and dy; returns dt.
    __device__ double direction(double centre, bool with_ones) {
        const int n_bundles = t_.n_bundles();
        for (int u = threadIdx.x; u < n_bundles; u += blockDim.x) {
            double missing = f_.sum[u] / scale_;
            for (int arc = t_.bundle_start[u]; arc < t_.bundle_start[u + 1]; ++arc) missing -= r_.x[arc] + gain(arc, centre);
            r_.push[u] = missing;
        }
        __syncthreads();
        if (valid_) {
            double right = gain_s(rank_, centre) - (t_value_ - r_.s[rank_] - load_of_rank());
            for (int i = t_.rank_start[rank_]; i < t_.rank_start[rank_ + 1]; ++i) {
                const ArcEntry entry{t_.rank_arc[i]};
                right += gain(entry.arc(), centre) + r_.th[entry.arc()] * r_.inverse_sum[entry.bundle()] * r_.push[entry.bundle()];
            }
            r_.h[rank_] = right;
        }
        __syncthreads();
        if (warp_id() == 0) back_solve(r_.h);
        if (warp_id() == 1 && with_ones) back_solve(r_.ones);
        __syncthreads();
        double sums[3] = {0, 0, 0};
        if (valid_) sums[0] = r_.p[rank_], sums[1] = r_.h[rank_], sums[2] = r_.ones[rank_];
        sum(sums);
        const double dt = (sums[1] - (1.0 - sums[0])) / sums[2];
        if (valid_) r_.dp[rank_] = r_.h[rank_] - dt * r_.ones[rank_];
        __syncthreads();
        for (int u = threadIdx.x; u < n_bundles; u += blockDim.x) {
            double right = r_.push[u];
            for (int arc = t_.bundle_start[u]; arc < t_.bundle_start[u + 1]; ++arc) right += r_.th[arc] * r_.dp[t_.arc_rank[arc]];
            r_.dy[u] = right * r_.inverse_sum[u];
        }
        __syncthreads();
        return dt;
    }

    struct Lengths {
        double primal, dual;
    };
    // How far the direction can be followed, 1 / kStep at most.
    __device__ Lengths lengths(double centre) {
        double length[2] = {1.0 / kStep, 1.0 / kStep};
        const auto limit = [&](double x, double z, const Change &at) {
            if (at.primal < 0) length[0] = min(length[0], -x / at.primal);
            if (at.dual < 0) length[1] = min(length[1], -z / at.dual);
        };
        const int n_arcs = t_.n_arcs();
        for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
            const ArcEntry entry{t_.rank_arc[i]};
            if (r_.x[entry.arc()] > 0) limit(r_.x[entry.arc()], r_.z[entry.arc()], change(entry.arc(), entry.bundle(), centre));
        }
        if (valid_) limit(r_.s[rank_], r_.p[rank_], change_s(centre));
        lowest(length);
        return {length[0], length[1]};
    }

    // ---- From reals to tokens

    // Largest remainder: every bundle keeps its tokens.
    __device__ void round_off() {
        for (int u = threadIdx.x; u < t_.n_bundles(); u += blockDim.x) {
            const int first = t_.bundle_start[u], last = t_.bundle_start[u + 1];
            int left = f_.sum[u];
            for (int arc = first; arc < last; ++arc) {
                const double real = min(max(r_.x[arc] * scale_, 0.0), (double)f_.sum[u]);
                f_.x[arc] = (int)real;
                left -= f_.x[arc];
            }
            for (; left != 0; left += left > 0 ? -1 : 1) {
                int best = -1;
                double most = 0;
                for (int arc = first; arc < last; ++arc) {
                    const double rest = left > 0 ? r_.x[arc] * scale_ - f_.x[arc] : f_.x[arc] - r_.x[arc] * scale_;
                    if (left < 0 && f_.x[arc] == 0) continue;
                    if (best < 0 || rest > most) best = arc, most = rest;
                }
                f_.x[best] += left > 0 ? 1 : -1;
            }
        }
        __syncthreads();
    }

    __device__ void cut() {
        int load = valid_ ? f_.base[rank_] : 0;
        if (valid_) {
            for (int i = t_.rank_start[rank_]; i < t_.rank_start[rank_ + 1]; ++i) load += f_.x[ArcEntry{t_.rank_arc[i]}.arc()];
        }
        max_load = (int)highest(load);
        for (int u = threadIdx.x; u < t_.n_bundles(); u += blockDim.x) r_.push[u] = lowest_price(u);
        __syncthreads();
        // The ranks at this rank's price or above; or this rank alone.
        int bound = 0;
        bool alone = false;
        if (valid_) {
            const double price = r_.p[rank_];
            int inside = 0, size = 0;
            for (int r = 0; r < n_; ++r) {
                if (r_.p[r] >= price) inside += f_.base[r], ++size;
            }
            for (int u = 0; u < t_.n_bundles(); ++u) inside += r_.push[u] >= price ? f_.sum[u] : 0;
            bound = Capacity::forced(inside, size);
            alone = f_.base[rank_] > bound;
            bound = max(bound, f_.base[rank_]);
        }
        end.level = (int)highest(bound);
        const int chosen = n_ - (int)highest(valid_ && bound == end.level ? n_ - rank_ : 0);
        const bool by_itself = __syncthreads_or(rank_ == chosen && alone) != 0;
        in_witness = valid_ && (by_itself ? rank_ == chosen : r_.p[rank_] >= r_.p[chosen]);
        end.witness_size = __syncthreads_count(in_witness);
        end.certified = max_load == end.level;
    }
};

}  // namespace lplb
