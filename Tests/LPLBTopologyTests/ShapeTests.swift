// The rules of ExpertShape: what is refused, as which kind, and with which words.

import LPLBTopology
import Testing

private func shape(_ ep: Int = 32, _ nodes: Int = 4, _ group: Int = 8, _ logical: Int = 256, _ physical: Int = 320) throws -> ExpertShape {
    try ExpertShape(epSize: ep, nNodes: nodes, groupSize: group, nLogical: logical, nPhysical: physical)
}

private func violation(_ body: () throws -> ExpertShape) -> RuleViolation? {
    do { _ = try body() } catch { return error as? RuleViolation }
    return nil
}

@Test func sizesThatFollowFromTheOthers() throws {
    let s = try shape()
    #expect(s.nLocal == 10)
    #expect(s.nGroups == 4)
    #expect(s.ranksPerNode == 8)
}

@Test(arguments: [(1, 1), (4, 1), (8, 1), (12, 1), (16, 2), (20, 1), (64, 8), (1024, 128)])
func hostsByDefault(epSize: Int, hosts: Int) throws {
    let s = try shape(epSize, 0, 0, epSize, epSize)
    #expect(s.nNodes == hosts)
    #expect(s.groupSize == epSize)
}

@Test func refusalsInWords() {
    #expect(violation { try shape(0) }?.message == "ep_size: must be at least 1, got 0")
    #expect(violation { try shape(.min) }?.kind == .invalidArgument)
    #expect(violation { try shape(8193) } == RuleViolation(.unsupported, "ep_size", "must be at most 8192", value: 8193))
    #expect(violation { try shape(.max) }?.kind == .unsupported)
    #expect(violation { try shape(32, -1) }?.message == "n_nodes: must be 0 (the default) or a divisor of ep_size, got -1")
    #expect(violation { try shape(32, 5) }?.message == "n_nodes: must divide ep_size 32, got 5")
    #expect(violation { try shape(32, .max) }?.kind == .invalidArgument)
    #expect(violation { try shape(32, 4, .min) }?.kind == .invalidArgument)
    #expect(violation { try shape(32, 4, 3) }?.message == "group_size: must divide ep_size 32, got 3")
    #expect(violation { try shape(32, 4, 64) }?.kind == .invalidArgument)
    let tooManyRanks = violation { try shape(2048, 0, 0, 4096, 4096) }
    #expect(tooManyRanks?.kind == .unsupported)
    #expect(tooManyRanks?.message == "group_size: must be at most 1024, got 0, which stands for ep_size 2048")
    #expect(violation { try shape(32, 4, 8, 0, 320) }?.kind == .invalidArgument)
    #expect(violation { try shape(32, 4, 8, 4097, 8192) }?.kind == .unsupported)
    #expect(violation { try shape(32, 4, 8, .max, .max) }?.kind == .unsupported)
    #expect(violation { try shape(32, 4, 8, 256, -320) }?.kind == .invalidArgument)
    #expect(violation { try shape(32, 4, 8, 256, 8224) }?.kind == .unsupported)
    #expect(violation { try shape(32, 4, 8, 256, 224) }?.message == "n_physical: must be at least n_logical 256, got 224")
    #expect(violation { try shape(32, 4, 8, 256, 300) }?.message == "n_physical: must be a multiple of ep_size 32, got 300")
}

@Test func largestSizesAreAccepted() throws {
    #expect(try shape(1024, 0, 0, 4096, 8192).nGroups == 1)
    #expect(try shape(8192, 1024, 1024, 4096, 8192).nGroups == 8)
    #expect(try shape(1, 1, 1, 1, 1).nLocal == 1)
}

/// Every combination of awkward integers is either refused or gives a shape that keeps the rules; none traps.
@Test func noIntegerTraps() {
    let awkward = [Int.min, -8, -1, 0, 1, 2, 8, 1024, 4096, 8192, 8193, Int.max]
    for ep in awkward {
        for nodes in awkward {
            for group in awkward {
                for logical in awkward {
                    for physical in awkward {
                        let made = try? ExpertShape(epSize: ep, nNodes: nodes, groupSize: group, nLogical: logical, nPhysical: physical)
                        guard let s = made else { continue }
                        let whole = s.nLocal * s.epSize == s.nPhysical && s.nGroups * s.groupSize == s.epSize
                        let hosts = s.ranksPerNode * s.nNodes == s.epSize
                        if !(whole && hosts && s.nLogical <= s.nPhysical && s.groupSize <= 1024) { Issue.record("\(s)") }
                    }
                }
            }
        }
    }
}
