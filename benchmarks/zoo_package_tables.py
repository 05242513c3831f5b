"""All models of `zoo_packages`' tables, by "package/name"."""

from __future__ import annotations

import zoo_packages_images
import zoo_packages_science
import zoo_packages_sounds
import zoo_packages_texts
from zoo_packages import Row

TABLE: dict[str, Row] = {
    **zoo_packages_images.TABLE,
    **zoo_packages_science.TABLE,
    **zoo_packages_sounds.TABLE,
    **zoo_packages_texts.TABLE,
}
