"""
The scaling law: the paper's (section 4.1, equation 1, after Busbridge et al.), and what runs that
it was not fitted to ask to be added to it.

    L(N, D) = (1 + delta) ( ( A / (N eff_N^t)^alpha  +  B / (D eff_D)^beta )^gamma  +  E )

    t = (D / 100 N)^tilt

A model of N parameters (without embedding and head) that is trained on D tokens reaches the
validation loss L, in nats a token. Each term is a price:

    A / N^alpha     of having too few parameters; alpha says how fast more of them help
    B / D^beta      of having seen too few tokens; beta says how fast more of them help
    gamma           how the two prices combine
    E               the loss that no model of this family gets below, whatever its size

Low precision acts like a smaller model and like less data. A quantised forward pass has an
efficiency eff_N < 1: the model is as good as one of N eff_N parameters. A quantised backward pass
has eff_D < 1: the run is as good as one on D eff_D tokens. For BF16 both are 1. This is the paper's
form; in it tilt and delta are 0.

Two things are different in the runs. What a quantised backward pass costs does not vanish with
tokens, as it would with eff_D: at every size and length it is nearly the same share of the loss, of
a gradient that points a little wrong to the end. That is delta. And a quantised forward pass costs
the more, the longer the model is trained: what a model has learnt from more tokens asks for more
digits. With tilt, eff_N is what holds at 100 tokens a parameter, and falls slowly from there on.
What is left of a forward pass at every length, such as clipping, is a delta, too.

The numbers span many orders of magnitude, so everything here is computed in logarithms. theta is
an array (..., 10) of the ten numbers of a law, in the order of NAMES; n = ln N and d = ln D are
arrays (runs,).
"""
import numpy as np

NAMES = ("ln A", "alpha", "ln B", "beta", "ln E", "gamma", "ln eff_N", "ln eff_D", "tilt",
         "ln(1+delta)")
LN_E, GAMMA, LN_EFF_N, LN_EFF_D, TILT, DELTA = range(4, 10)     # where these stand in theta
LN_RATIO = np.log(100)                  # tokens a parameter at which eff_N is stated
BF16 = ("BF16", "BF16")                 # (forward, backward) of the runs with eff_N = eff_D = 1


def unpack(theta):
    """Splits theta (..., k) into k arrays (..., 1), which broadcast against runs."""
    return np.moveaxis(theta[..., None], -2, 0)


def log_terms(theta, n, d):
    """
    Computes the logarithms of the price of size and of the price of data, each (..., runs).

    They are ln(A / (N eff_N^t)^alpha) and ln(B / (D eff_D)^beta).
    """
    ln_A, alpha, ln_B, beta, _, _, ln_eff_N, ln_eff_D, tilt, _ = unpack(theta)
    t = np.exp(tilt * (d - n - LN_RATIO))
    size_term = ln_A - alpha * (n + ln_eff_N * t)
    data_term = ln_B - beta * (d + ln_eff_D)
    return size_term, data_term


def log_loss(theta, n, d):
    """Computes ln L of each run, of shape (..., runs)."""
    ln_E, gamma, delta = unpack(theta[..., [LN_E, GAMMA, DELTA]])
    size_term, data_term = log_terms(theta, n, d)
    return np.logaddexp(gamma * np.logaddexp(size_term, data_term), ln_E) + delta


def price_derivatives(theta, n, d):
    """
    Computes what the derivatives of ln L are made of, each of shape (..., runs).

    These are the logarithm of the sum of the two prices, and the derivatives of ln L with respect
    to the logarithm of the sum's power, of the price of size and of the price of data.
    """
    ln_E, gamma = unpack(theta[..., [LN_E, GAMMA]])
    size_term, data_term = log_terms(theta, n, d)
    log_sum = np.logaddexp(size_term, data_term)
    # The chain rule: L is the sum to the power of gamma, and E; the sum is that of two terms.
    by_power = np.exp(gamma * log_sum - np.logaddexp(gamma * log_sum, ln_E))
    by_size = by_power * gamma * np.exp(size_term - log_sum)
    by_data = by_power * gamma * np.exp(data_term - log_sum)
    return log_sum, by_power, by_size, by_data


def jacobian(theta, n, d):
    """Computes the derivatives of log_loss with respect to theta, of shape (..., runs, 10)."""
    _, alpha, _, beta, _, _, ln_eff_N, ln_eff_D, tilt, _ = unpack(theta)
    log_sum, by_power, by_size, by_data = price_derivatives(theta, n, d)
    ratio = d - n - LN_RATIO
    t = np.exp(tilt * ratio)
    return np.stack((
        by_size,                                    # ln A
        -by_size * (n + ln_eff_N * t),              # alpha
        by_data,                                    # ln B
        -by_data * (d + ln_eff_D),                  # beta
        1 - by_power,                               # ln E
        by_power * log_sum,                         # gamma
        -by_size * alpha * t,                       # ln eff_N
        -by_data * beta,                            # ln eff_D
        -by_size * alpha * ln_eff_N * t * ratio,    # tilt
        np.ones_like(by_power),                     # ln(1 + delta)
    ), -1)
