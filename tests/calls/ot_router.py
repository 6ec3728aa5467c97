from gradops import ot

from . import Call

CALLS = {
    "router": Call(lambda x: (x, False, 2, 3, 20, 1.0, 1e-2), lambda x: ot.router(x, top_k=2, capacity=3)[1]),
}
