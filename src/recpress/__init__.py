"""recpress: smaller training for recommendation models on TorchRec.

The packages are the folders of the repository, linked here so that every tool sees one import tree.
"""

import logging
import sys

from recpress._moved import Finder

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library prints nothing by itself
sys.meta_path.append(Finder())  # after all others: it finds only import paths of the last version
