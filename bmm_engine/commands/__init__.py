"""One thin function per command of `bmm`."""
