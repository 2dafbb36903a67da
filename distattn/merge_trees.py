"""The trees of merges that a schedule makes: which shards a device holds, in which order of operands."""


class Trees:
    """The merge trees that occur, each stored once, as numbers: tree r < size is shard r."""

    def __init__(self, size: int):
        self._lowest = list(range(size))
        self._shards = [1] * size  # as bits, the lowest shard at bit 0: short among neighbours
        self._known: dict[tuple[int, int], int] = {}  # (first operand, second) -> tree

    def precedes(self, a: int, b: int) -> bool:
        """Whether a is the first operand of a merge with b: it has the lowest shard of both."""
        return self._lowest[a] < self._lowest[b]

    def shards(self, tree: int) -> int:
        """The shards in a tree, as bits."""
        return self._shards[tree] << self._lowest[tree]

    def receive(self, own: int, message: int) -> tuple[int, bool, int]:
        """The tree after a message, whether it replaced the own one, and shards counted twice."""
        operands = (own, message) if self.precedes(own, message) else (message, own)
        if operands not in self._known:
            a, b = self.shards(own), self.shards(message)
            if a & b:
                return message, True, 0 if a & b == a else a & b
            self._known[operands] = len(self._shards)
            self._lowest.append(self._lowest[operands[0]])
            self._shards.append((a | b) >> self._lowest[-1])
        return self._known[operands], False, 0


def name_shards(bits: int) -> str:
    """'shard 3', or 'shards 0, 2, 4', at most four of them."""
    found = [str(shard) for shard in range(bits.bit_length()) if bits >> shard & 1]
    more = ", ..." if len(found) > 4 else ""
    return ("shard " if len(found) == 1 else "shards ") + ", ".join(found[:4]) + more
