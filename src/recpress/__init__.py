"""recpress: smaller training for recommendation models on TorchRec.

The packages are the folders of the repository, linked here so that every tool sees one import tree.
"""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library prints nothing by itself
