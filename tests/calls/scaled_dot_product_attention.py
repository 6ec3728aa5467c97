from gradops import curvature

from . import Call

SCALED = (None, 0.4, False)  # mask, scale, causal


def kept(x):
    """An output and its rows' logsumexp."""
    return x.sin(), (x @ x.mT * 0.4).logsumexp(-1)


def backward(x):
    return x, x, x, *SCALED, *kept(x), x


def with_changes(x):
    return *backward(x), x, None, x, *kept(x), x, 5


CALLS = {
    "scaled_dot_product_attention": Call(
        lambda x: (x, x, x, x @ x.mT > 0, 0.4, True),
        lambda x: curvature.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True)),
    "scaled_dot_product_attention_dual": Call(lambda x: (x, x, x, *SCALED, None, x, x), None),
    "scaled_dot_product_attention_jvp": Call(lambda x: (x, x, x, *SCALED, *kept(x), x, x, None), None),
    "scaled_dot_product_attention_backward": Call(lambda x: (*backward(x), 7), None),
    "scaled_dot_product_attention_backward_jvp": Call(with_changes, None),
    "scaled_dot_product_attention_backward_dual": Call(with_changes, None),
}
