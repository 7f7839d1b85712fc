"""
The scaling law of the paper (section 4.1, eq. 1, after Busbridge et al.):

    L(N, D) = ( A / (N eff_N)^alpha  +  B / (D eff_D)^beta )^gamma  +  E

N parameters trained on D tokens reach the validation loss L. Too few parameters cost the first term, too few tokens the
second; E is what no model of this family gets below. Low precision acts like a smaller model and like less data: a
quantised forward pass has eff_N < 1, a quantised backward pass eff_D < 1, BF16 has both = 1.

Everything is computed in logarithms: theta, the eight numbers of a law (NAMES), and n = ln N, d = ln D of the runs.
"""
import numpy as np

NAMES = "ln A", "alpha", "ln B", "beta", "ln E", "gamma", "ln eff_N", "ln eff_D"        # theta
BF16 = "BF16", "BF16"                                           # forward and backward of the runs with eff_N = eff_D = 1


def terms(theta, n, d):
    """the two terms of the sum, as logarithms: theta (..., 8), n and d (..., runs) -> (..., runs), twice"""
    a, alpha, b, beta, _, _, eff_n, eff_d = np.moveaxis(theta[..., None], -2, 0)
    return a - alpha * (n + eff_n), b - beta * (d + eff_d)


def log_loss(theta, n, d):
    """ln L (..., runs)"""
    e, gamma = theta[..., 4, None], theta[..., 5, None]
    return np.logaddexp(gamma * np.logaddexp(*terms(theta, n, d)), e)


def slopes(theta, n, d):
    """its derivatives with respect to theta (..., runs, 8)"""
    _, alpha, _, beta, e, gamma, eff_n, eff_d = np.moveaxis(theta[..., None], -2, 0)
    s, t = terms(theta, n, d)
    u = np.logaddexp(s, t)                                      # ln of the sum
    by_u = np.exp(gamma * u - log_loss(theta, n, d))            # d ln L / d (gamma u)
    by_s, by_t = by_u * gamma * np.exp(s - u), by_u * gamma * np.exp(t - u)
    return np.stack((by_s, -by_s * (n + eff_n), by_t, -by_t * (d + eff_d), 1 - by_u, by_u * u,
                     -by_s * alpha, -by_t * beta), -1)
