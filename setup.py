# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What setup.cfg cannot say: the kernels' sources are inside the package in a wheel, and beside it
in a checkout. `cupy_cache.runtime.modules.kernel_dir` finds them in either place.

If ``package_dir`` said so, an editable install would be an import hook, which type checkers do not
follow. This way it is a path.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command import build_py

SOURCES = sorted(Path("kernels_cu").rglob("*.cu*"))


class BuildPy(build_py.build_py):
    """With the kernels' sources, but for an editable install."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source in SOURCES:
                target = Path(self.build_lib, "cupy_cache", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_source_files(self):
        """What a source distribution contains."""
        return [*super().get_source_files(), *map(str, SOURCES)]


def long_description():
    """The README for an index of packages, where links to files of the checkout lead nowhere: links
    become their text, and pictures what they show. The project has no address of its own that they
    could be made absolute with."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)", r"*Picture: \1.*", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    cmdclass={"build_py": BuildPy},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
