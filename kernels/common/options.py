"""Options of the commands in this folder."""

import argparse
from typing import NoReturn


class Options(argparse.ArgumentParser):
    """Says in one sentence what is wrong with a request, and exits with 2; argparse prints its whole usage before."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows the options\n")
