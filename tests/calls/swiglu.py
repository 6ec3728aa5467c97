from gradops.curvature import swiglu

from . import Call


def six(x):
    return x, x + 1, x.sin(), x.cos(), 2 * x, 1 - x


CALLS = {
    "swiglu": Call(lambda x: (x, x + 1), lambda x: swiglu(x, x.sin())),
    "swiglu_jvp": Call(lambda x: (x, x + 1, x.sin(), x.cos()), None),
    "swiglu_dual": Call(lambda x: (x, x + 1, x.sin(), x.cos()), None),
    "swiglu_backward": Call(lambda x: (*six(x)[:3], 3), None),
    "swiglu_backward_jvp": Call(lambda x: (*six(x), 3), None),
    "swiglu_backward_dual": Call(lambda x: (*six(x), 3), None),
}
