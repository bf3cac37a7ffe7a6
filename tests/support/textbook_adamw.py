"""AdamW by its formula, for rows of one generation, and generations of every kind."""

from megatron_tf.checkpoint.generations import Generation

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
GENERATIONS = {
    "as old as the model": Generation(exp_avg_steps=7, exp_avg_sq_steps=7),
    "new": Generation(growth=1),
    "with a new second moment": Generation(exp_avg_steps=7, exp_avg_sq_steps=0),
    "with a new first moment": Generation(exp_avg_steps=0, exp_avg_sq_steps=9),
    "at a scaled step": Generation(exp_avg_steps=3, exp_avg_sq_steps=3, step_scale=0.25),
    "at a scaled step with a new second moment": Generation(exp_avg_steps=3, step_scale=1 / 3),
    "at a scaled rate": Generation(exp_avg_steps=3, exp_avg_sq_steps=3, lr_scale=0.5),
    "warming up": Generation(exp_avg_steps=3, exp_avg_sq_steps=3, rewarmup_iters=4, rewarmup_done=1),
    "frozen": Generation(exp_avg_steps=3, exp_avg_sq_steps=3, lr_scale=0.0),
}


def textbook(value, moments, generation, *, gradients, rates):
    """AdamW (arXiv 1711.05101, algorithm 2) of some rows, whose schedule has these rates."""
    m, v = (moment.clone() for moment in moments)
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        if generation.lr_scale == 0:
            break
        lr = rate * generation.lr_scale
        if generation.rewarmup_iters:
            lr *= min(1, (generation.rewarmup_done + number) / generation.rewarmup_iters)
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        m_hat = m / (1 - BETAS[0] ** (generation.exp_avg_steps + number))
        v_hat = v / (1 - BETAS[1] ** (generation.exp_avg_sq_steps + number))
        value = value - lr * DECAY * value - lr * generation.step_scale * m_hat / (v_hat.sqrt() + EPS)
    return value, m, v
