// adadelta_step: one step of Adadelta (Zeiler, 2012, arXiv:1212.5701), in place, in one pass:
//   g           = grad + weight_decay * param
//   square_avg  = rho * square_avg + (1 - rho) * g^2
//   delta       = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
//   acc_delta   = rho * acc_delta + (1 - rho) * delta^2
//   param      -= lr * delta
// Bytes moved: reads 4 n items, writes 3 n. No streaming stores: what is written was just read, so
// its line is in the caches. Included once per instruction set by common/for_each_isa.h.

// `one_less_rho` is 1 - rho before it was rounded to Acc.
template <class Acc>
struct AdadeltaRates {
  Acc lr, rho, one_less_rho, eps, weight_decay;
};

// Without decay nothing of param may reach the gradient: 0 * inf would be NaN.
template <class Acc, bool kDecays, class T>
void adadelta_step(T* __restrict param, const T* __restrict grad, T* __restrict square_avg,
                   T* __restrict acc_delta, int64_t n, const AdadeltaRates<Acc> rates) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc p = Acc(param[i]);
    const Acc g = kDecays ? Acc(grad[i]) + rates.weight_decay * p : Acc(grad[i]);
    const Acc mean_square = rates.rho * Acc(square_avg[i]) + rates.one_less_rho * (g * g);
    const Acc acc = Acc(acc_delta[i]);
    const Acc delta = std::sqrt(acc + rates.eps) / std::sqrt(mean_square + rates.eps) * g;
    square_avg[i] = T(mean_square);
    acc_delta[i] = T(rates.rho * acc + rates.one_less_rho * (delta * delta));
    param[i] = T(p - rates.lr * delta);
  }
}
