"""A machine that commands of an instance start and stop, and commands that wait."""

import sys


class Machine:
    """A machine that commands switch: its state is the content of a file, which they replace."""

    def __init__(self, folder):
        self.state = folder / "state"
        for word in ("running", "shut off"):
            (folder / word).write_text(f"{word}\n\n")
        self.state.write_text("running\n")
        self.deaf = folder / "deaf"
        press = 'test -e "$1" || exec ln -sfT "$2" "$3"'
        self.commands = {
            "stop_command": ("sh", "-c", press, "press", str(self.deaf), str(folder / "shut off"), str(self.state)),
            "force_stop_command": ("ln", "-sfT", str(folder / "shut off"), str(self.state)),
            "start_command": ("ln", "-sfT", str(folder / "running"), str(self.state)),
            "state_command": ("cat", str(self.state)),
        }

    def say(self, word):
        """Have it in another state, whatever its commands were to do: `running` or `shut off`."""
        self.state.unlink()
        self.state.write_text(f"{word}\n")

    def deafen(self):
        """Have its guest ignore the power button."""
        self.deaf.touch()

    def hear(self):
        """Have it hear the power button again."""
        self.deaf.unlink()


def command_that_waits(gate, begun):
    """Return a command that creates the file `begun`, and ends when the file `gate` exists."""
    code = f"import os, time\nopen({str(begun)!r}, 'w')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    return (sys.executable, "-c", code)
