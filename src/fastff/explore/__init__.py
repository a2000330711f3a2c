"""`fastff explore`: which leaves every token of a text takes, as one page that needs no server and no network."""

from fastff.explore.explore_settings import ExploreSettings

__all__ = ["ExploreSettings"]
