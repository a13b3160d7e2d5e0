"""A simulated machine that the commands of an instance start and stop, and a command that waits."""

import sys


class Machine:
    """A simulated machine. Its state is the content of a file, which the commands replace."""

    def __init__(self, folder):
        self.state = folder / "state"
        for state in ("running", "shut off"):
            (folder / state).write_text(f"{state}\n\n")
        self.state.write_text("running\n")
        self._ignores_button = folder / "ignores-button"
        press = 'test -e "$1" || exec ln -sfT "$2" "$3"'
        self.commands = {
            "stop_command": (
                "sh",
                "-c",
                press,
                "press",
                str(self._ignores_button),
                str(folder / "shut off"),
                str(self.state),
            ),
            "force_stop_command": ("ln", "-sfT", str(folder / "shut off"), str(self.state)),
            "start_command": ("ln", "-sfT", str(folder / "running"), str(self.state)),
            "state_command": ("cat", str(self.state)),
        }

    def set_state(self, state):
        """Change the state without a command: `running` or `shut off`."""
        self.state.unlink()
        self.state.write_text(f"{state}\n")

    def ignore_power_button(self):
        """Let the guest ignore the power button."""
        self._ignores_button.touch()

    def obey_power_button(self):
        """Let the guest react to the power button again."""
        self._ignores_button.unlink()


def command_that_waits(gate, begun):
    """Return a command that creates the file `begun`, and ends when the file `gate` exists."""
    code = f"import os, time\nopen({str(begun)!r}, 'w')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    return (sys.executable, "-c", code)
