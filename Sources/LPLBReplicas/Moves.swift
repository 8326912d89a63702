// Moves: which rows of a tensor go from which rank to which, in rounds in which no link is asked twice.

/// A row of a tensor that goes from one rank to another.
public struct Move: Sendable, Equatable {
    public struct Place: Sendable, Equatable {
        public let rank: Int, row: Int
    }
    /// In one round no rank is the source of two moves, and none the target of two.
    public internal(set) var round: Int
    public let source: Place, target: Place
}

extension Rows {
    /// From homes to copies, in as few rounds as any schedule: the largest number of moves that a rank is the source, or the target, of.
    /// - Parameter known: copies that lie in the same row there are left out.
    public func pulls(except known: Rows? = nil) -> [Move] {
        var moves: [Move] = []
        eachCopy { rank, row, expert in
            if let known, row >= known.own[rank], known.experts[rank * nRows + row] == expert { return }
            moves.append(Move(round: 0, source: place(home[expert]), target: Move.Place(rank: rank, row: row)))
        }
        return coloured(moves)
    }

    /// From copies to homes. What comes to one home row comes from the lowest rank first, since sums depend on their order; so the rounds
    /// may be more than the fewest, but fewer than twice as many.
    public func pushes() -> [Move] {
        var moves: [Move] = []
        var sends = [Set<Int>](repeating: [], count: nRanks), gets = sends, next = [Int](repeating: 0, count: nLogical)
        eachCopy { rank, row, expert in
            let target = place(home[expert])
            var round = next[expert]
            while sends[rank].contains(round) || gets[target.rank].contains(round) { round += 1 }
            sends[rank].insert(round)
            gets[target.rank].insert(round)
            next[expert] = round + 1
            moves.append(Move(round: round, source: Move.Place(rank: rank, row: row), target: target))
        }
        return moves.inRounds()
    }

    /// Own experts whose home is on another rank than in `former`.
    public func homeMoves(from former: Rows) -> [Move] {
        coloured((0..<nLogical).compactMap { expert in
            let old = former.place(former.home[expert]), new = place(home[expert])
            return old.rank == new.rank ? nil : Move(round: 0, source: old, target: new)
        })
    }

    private func place(_ index: Int) -> Move.Place { Move.Place(rank: index / nRows, row: index % nRows) }

    /// Gives each move a round, as few as possible: an edge colouring of the graph of sources and targets, which is bipartite, so that its
    /// largest degree suffices (König). A move takes a round that is free at its source; where its target is busy in it, the moves on the
    /// path from there that alternate between this round and one that is free at the target swap the two.
    private func coloured(_ moves: [Move]) -> [Move] {
        var moves = moves
        var sends = [Int](repeating: 0, count: nRanks), gets = sends
        for move in moves {
            sends[move.source.rank] += 1
            gets[move.target.rank] += 1
        }
        let rounds = max(sends.max() ?? 0, gets.max() ?? 0)
        // The move of each rank in each round, -1 for none: as a source [0], as a target [1].
        var at = [[Int]](repeating: [Int](repeating: -1, count: nRanks * rounds), count: 2)
        func free(_ side: Int, _ rank: Int) -> Int { at[side][rank * rounds..<(rank + 1) * rounds].firstIndex(of: -1)! - rank * rounds }
        func enter(_ index: Int, _ move: Int) {
            at[0][moves[index].source.rank * rounds + moves[index].round] = move
            at[1][moves[index].target.rank * rounds + moves[index].round] = move
        }
        for index in moves.indices {
            let wanted = free(0, moves[index].source.rank), other = free(1, moves[index].target.rank)
            var path: [Int] = [], side = 1, rank = moves[index].target.rank
            while wanted != other {
                let next = at[side][rank * rounds + (side == 1 ? wanted : other)]
                if next < 0 { break }
                path.append(next)
                rank = side == 1 ? moves[next].source.rank : moves[next].target.rank
                side = 1 - side
            }
            for step in path { enter(step, -1) }
            for step in path {
                moves[step].round = moves[step].round == wanted ? other : wanted
                enter(step, step)
            }
            moves[index].round = wanted
            enter(index, index)
        }
        return moves.inRounds()
    }
}

extension [Move] {
    fileprivate func inRounds() -> [Move] {
        sorted { ($0.round, $0.target.rank, $0.target.row) < ($1.round, $1.target.rank, $1.target.row) }
    }
}
