"""The fake trainer under the device's witness."""

from tests.chaos import witness

if __name__ == "__main__":
    witness.run("tests.fake_trainer")
