// Joint: copies and places chosen together, for sizes so small that greedy copies leave much on the table.

/// Looks for better numbers of copies: one expert gets one more, another one less, each choice placed anew. The best such neighbour is
/// taken even where it is worse, but no numbers of copies are taken twice (tabu search).
struct JointSearch {
    /// More slots than these are balanced well enough by single exchanges, and would take too long here.
    static let mostSlots = 32
    /// How far above the wanted level the heaviest rank must be.
    static let worthwhile = 1.01
    private static let steps = 24, patience = 6

    private let board: Board, weight: UnsafePointer<Double>, level: Double
    /// The best so far: duplicates, the heaviest load, and what the ranks hold.
    private var best: (duplicates: Int, load: Double, phy2log: [Int32])

    /// - Parameter board: placed; its copies are where the search begins.
    init(_ board: Board, weight: UnsafePointer<Double>, level: Double) {
        (self.board, self.weight, self.level) = (board, weight, level)
        best = (board.duplicates, board.heaviest, board.phy2log)
    }

    /// Leaves the best placement found on the board.
    mutating func run() {
        let n = board.nLogical
        var copies = (0..<n).map { board.copies[$0] }
        var seen: Set<[Int]> = [copies]
        var sinceBest = 0
        for _ in 0..<JointSearch.steps where best.load > level && sinceBest < JointSearch.patience {
            var found: (duplicates: Int, load: Double, more: Int, less: Int)?
            sinceBest += 1
            for less in 0..<n where copies[less] > 1 {
                for more in 0..<n where more != less && copies[more] < board.live.count && weight[more] > 0 {
                    arrange(copies, more: more, less: less)
                    let duplicates = board.duplicates, load = board.heaviest
                    let isBest = (duplicates, load) < (best.duplicates, best.load)
                    if isBest {
                        best = (duplicates, load, board.phy2log)
                        sinceBest = 0
                    }
                    guard found.map({ (duplicates, load) < ($0.duplicates, $0.load) }) ?? true else { continue }
                    if !seen.contains(changed(copies, more, less)) { found = (duplicates, load, more, less) }
                }
            }
            guard let next = found else { break }
            copies = changed(copies, next.more, next.less)
            seen.insert(copies)
        }
        board.take(best.phy2log)
        board.weigh(weight)
    }

    private func changed(_ copies: [Int], _ more: Int, _ less: Int) -> [Int] {
        var copies = copies
        copies[more] += 1
        copies[less] -= 1
        return copies
    }

    private func arrange(_ copies: [Int], more: Int, less: Int) {
        for e in 0..<board.nLogical {
            board.copies[e] = copies[e] + (e == more ? 1 : 0) - (e == less ? 1 : 0)
            board.share[e] = weight[e] / Double(board.copies[e])
        }
        arrangeCopies(board, to: level)
    }
}
