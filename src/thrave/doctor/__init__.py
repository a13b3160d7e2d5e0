"""Whether everything is there that a bundle task will need: tried before anyone's instance is shut down."""
