"""How a GPU hands blocks to its multiprocessors: two at a time each, in order, the next where one ends."""

import heapq


def loads(blocks, multiprocessors, together=2):
    """The work that each multiprocessor gets of blocks with this much work.

    Blocks that share a multiprocessor take turns, so each gets its part of the speed.
    """
    waiting = iter(blocks)
    loads, now = [0] * multiprocessors, [0.0] * multiprocessors
    resident = [[] for _ in range(multiprocessors)]
    ends, freed = [], range(multiprocessors)
    while True:
        for space in range(together):
            for one in freed:
                block = next(waiting, None) if len(resident[one]) == space else None
                if block is not None:
                    resident[one].append(block)
                    loads[one] += block
        for one in freed:
            if resident[one]:
                heapq.heappush(ends, (now[one] + min(resident[one]) * len(resident[one]), one))
        if not ends:
            return loads
        time, freed = ends[0][0], []
        while ends and ends[0][0] <= time + 1e-6:
            one = heapq.heappop(ends)[1]
            done = (time - now[one]) / len(resident[one])
            resident[one] = [left - done for left in resident[one] if left - done > 1e-6]
            now[one] = time
            freed.append(one)
        freed.sort()
