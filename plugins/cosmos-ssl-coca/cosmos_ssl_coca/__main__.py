"""``python -m cosmos_ssl_coca`` says where the recipe lies, for ``cosmos-launch --config``."""

from cosmos_ssl_coca import RECIPE

if __name__ == "__main__":
    print(RECIPE)
