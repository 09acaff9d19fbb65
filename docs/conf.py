"""The documentation site: ``make site``."""

import os
import sys
import tempfile
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from lf_dense import __version__

project = "lf_dense"
author = "the lf_dense contributors"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "model_zoo",
    "root_pages",
]
exclude_patterns = ["_build", "_ext"]
# Shell, Python and listings share the pages: what names no language has none.
highlight_language = "none"

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 4

# A notebook runs each time its page is built, in a folder of its own. An error in a cell ends the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
# The kernels run without the user's own settings. They warn that they talk over TCP, which stays within this
# machine.
ipython_folder = tempfile.TemporaryDirectory()
profile = Path(ipython_folder.name, "profile_default")
profile.mkdir()
Path(profile, "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 40\n")
os.environ["IPYTHONDIR"] = ipython_folder.name

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"lf_dense {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
# A click on a picture opens it in its full size.
html_scaled_image_link = True
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


def scale_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Give each picture a scale, since Sphinx links those alone to their files."""
    for picture in doctree.findall(nodes.image):
        if not {"scale", "width", "height"} & set(picture.attributes):
            picture["scale"] = 100


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", scale_pictures)
