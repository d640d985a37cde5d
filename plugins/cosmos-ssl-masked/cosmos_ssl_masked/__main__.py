"""``python -m cosmos_ssl_masked mae`` says where a recipe lies, for ``cosmos-launch --config``."""

import argparse

from cosmos_ssl_masked import RECIPES

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cosmos_ssl_masked", description="Say where a recipe lies.")
    parser.add_argument("method", choices=RECIPES)
    print(RECIPES[parser.parse_args().method])
