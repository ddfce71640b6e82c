"""The meaning: full logits [N, V]; their statistics have a hand-written gradient, the product is autodiff's."""

import jax

from kernels.entropy_covariance.logits import Head


def token_statistics(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, head: Head, row_shards: int, vocab_shards: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there."""
    del row_shards, vocab_shards  # the compiler splits whole rows by itself

    @jax.custom_vjp
    def statistics(raw, targets, temperature):
        return head._replace(temperature=temperature).statistics(raw, targets)

    def forward(raw, targets, temperature):
        out = statistics(raw, targets, temperature)
        return out, (raw, targets, temperature, out)

    def backward(residuals, g):
        raw, targets, temperature, out = residuals
        return head._replace(temperature=temperature).cotangent(raw, targets, out, g), None, None

    statistics.defvjp(forward, backward)
    return statistics(head.raw(hidden, unembedding), targets, head.temperature)
