"""``python -m cosmos_ssl_moco`` says where the recipe lies, for ``cosmos-launch --config``; with ``pictures`` where
MoCo v3's does.
"""

import sys

from cosmos_ssl_moco import PICTURES, RECIPE

if __name__ == "__main__":
    print(PICTURES if sys.argv[1:] == ["pictures"] else RECIPE)
