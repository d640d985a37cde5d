"""``python -m cosmos_ssl_flair`` says where the recipe lies, for ``cosmos-launch --config``."""

from cosmos_ssl_flair import RECIPE

if __name__ == "__main__":
    print(RECIPE)
