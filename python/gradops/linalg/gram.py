from .reference import gram  # noqa
