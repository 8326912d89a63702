// Keeping: which rank gets which part of a new placement, so that many experts stay where they are.

/// Gives the parts of the placement on the board to the ranks that hold most of their experts already: the largest overlaps first, then
/// pairs of ranks swap parts while more experts stay. Only ranks of one class take each other's part.
/// - Parameter classes: ranks with equally many slots, which may take each other's part.
func keepExperts(_ board: Board, _ previous: ArraySlice<Int32>, classes: [[Int]]) {
    let parts = board.phy2log, nRanks = board.nRanks, width = board.width
    var hosts = [[Int]](repeating: [], count: board.nLogical)
    for (slot, e) in previous.enumerated() where e >= 0 && hosts[Int(e)].last != slot / width { hosts[Int(e)].append(slot / width) }
    var stays = [Int](repeating: 0, count: nRanks * nRanks)  // [part][rank]: experts of the part that the rank holds
    for part in 0..<nRanks {
        for e in Set(parts[part * width..<(part + 1) * width]) where e >= 0 {
            for rank in hosts[Int(e)] { stays[part * nRanks + rank] += 1 }
        }
    }
    var result = parts
    for ranks in classes {
        let target = ranksThatKeepMost(ranks, stays, nRanks)
        for (index, part) in ranks.enumerated() {
            result.replaceSubrange(target[index] * width..<(target[index] + 1) * width, with: parts[part * width..<(part + 1) * width])
        }
    }
    board.take(result)
}

/// The rank of each part; parts are called by the ranks that they are on now.
private func ranksThatKeepMost(_ ranks: [Int], _ stays: [Int], _ nRanks: Int) -> [Int] {
    var pairs: [(part: Int, rank: Int)] = []
    for part in ranks.indices {
        for rank in ranks where stays[ranks[part] * nRanks + rank] > 0 { pairs.append((part, rank)) }
    }
    func kept(_ part: Int, _ rank: Int) -> Int { stays[ranks[part] * nRanks + rank] }
    pairs.sort { (kept($0.part, $0.rank), $1.part, $1.rank) > (kept($1.part, $1.rank), $0.part, $0.rank) }
    var target = [Int](repeating: -1, count: ranks.count), isTaken = [Bool](repeating: false, count: nRanks)
    for (part, rank) in pairs where target[part] < 0 && !isTaken[rank] {
        target[part] = rank
        isTaken[rank] = true
    }
    var free = ranks.filter { !isTaken[$0] }.makeIterator()
    for part in ranks.indices where target[part] < 0 { target[part] = free.next() ?? ranks[part] }
    for _ in 0..<3 {
        var swapped = false
        for one in ranks.indices {
            for other in ranks.indices where other > one {
                let (a, b) = (target[one], target[other])
                guard kept(one, b) + kept(other, a) > kept(one, a) + kept(other, b) else { continue }
                (target[one], target[other]) = (b, a)
                swapped = true
            }
        }
        if !swapped { break }
    }
    return target
}
