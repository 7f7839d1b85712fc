"""
The scaling law of the paper (section 4.1, equation 1, after Busbridge et al.).

    L(N, D) = ( A / (N eff_N)^alpha  +  B / (D eff_D)^beta )^gamma  +  E

A model of N parameters (without embedding and head) that is trained on D tokens reaches the
validation loss L, in nats a token. Each term is a price:

    A / N^alpha     of having too few parameters; alpha says how fast more of them help
    B / D^beta      of having seen too few tokens; beta says how fast more of them help
    gamma           how the two prices combine
    E               the loss that no model of this family gets below, whatever its size

Low precision acts like a smaller model and like less data. A quantised forward pass has an
efficiency eff_N < 1: the model is as good as one of N eff_N parameters. A quantised backward pass
has eff_D < 1: the run is as good as one on D eff_D tokens. For BF16 both are 1.

The numbers span many orders of magnitude, so everything here is computed in logarithms. theta is
an array (..., 8) of the eight numbers of a law, in the order of NAMES; n = ln N and d = ln D are
arrays (runs,).
"""
import numpy as np

NAMES = ("ln A", "alpha", "ln B", "beta", "ln E", "gamma", "ln eff_N", "ln eff_D")
LN_E, GAMMA = 4, 5                      # where these two stand in theta
BF16 = ("BF16", "BF16")                 # (forward, backward) of the runs with eff_N = eff_D = 1


def unpack(theta):
    """Splits theta (..., 8) into eight arrays (..., 1), which broadcast against runs."""
    return np.moveaxis(theta[..., None], -2, 0)


def log_terms(theta, n, d):
    """Computes ln(A / (N eff_N)^alpha) and ln(B / (D eff_D)^beta), each of shape (..., runs)."""
    ln_A, alpha, ln_B, beta, _, _, ln_eff_N, ln_eff_D = unpack(theta)
    size_term = ln_A - alpha * (n + ln_eff_N)
    data_term = ln_B - beta * (d + ln_eff_D)
    return size_term, data_term


def log_loss(theta, n, d):
    """Computes ln L of each run, of shape (..., runs)."""
    ln_E = theta[..., LN_E, None]
    gamma = theta[..., GAMMA, None]
    size_term, data_term = log_terms(theta, n, d)
    return np.logaddexp(gamma * np.logaddexp(size_term, data_term), ln_E)


def jacobian(theta, n, d):
    """Computes the derivatives of log_loss with respect to theta, of shape (..., runs, 8)."""
    _, alpha, _, beta, ln_E, gamma, ln_eff_N, ln_eff_D = unpack(theta)
    size_term, data_term = log_terms(theta, n, d)
    log_sum = np.logaddexp(size_term, data_term)

    # The chain rule: L is the sum to the power of gamma, and E; the sum is that of two terms.
    by_power = np.exp(gamma * log_sum - np.logaddexp(gamma * log_sum, ln_E))
    by_size = by_power * gamma * np.exp(size_term - log_sum)
    by_data = by_power * gamma * np.exp(data_term - log_sum)
    return np.stack((
        by_size,                        # ln A
        -by_size * (n + ln_eff_N),      # alpha
        by_data,                        # ln B
        -by_data * (d + ln_eff_D),      # beta
        1 - by_power,                   # ln E
        by_power * log_sum,             # gamma
        -by_size * alpha,               # ln eff_N
        -by_data * beta,                # ln eff_D
    ), -1)
