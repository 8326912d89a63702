// One thread at a time, and an end that waits for it.

import Synchronization

/// Lets one thread at a time into an object. What ends the object is done when nobody is inside: by the thread that asks for it, or, where
/// another one is inside, by that one as it leaves. So nothing is taken away under a call, and nobody waits.
struct Gate: ~Copyable {
    private let inside = Atomic<Bool>(false)
    private let asked = Atomic<UInt8>(0)

    /// False: another thread is inside. Otherwise leave() must follow.
    func enter() -> Bool { inside.compareExchange(expected: false, desired: true, ordering: .sequentiallyConsistent).exchanged }

    /// Ends what enter() began. `finish` does what others have asked for in the meantime.
    func leave(_ finish: (UInt8) -> Void) {
        // Sequentially consistent, here and where it is asked: of a thread that leaves and one that asks, one sees the other.
        inside.store(false, ordering: .sequentiallyConsistent)
        settle(finish)
    }

    /// Asks for `finish(what)`, bits of things to do. Done on return, unless another thread is inside: then by that one.
    func ask(_ what: UInt8, _ finish: (UInt8) -> Void) {
        asked.bitwiseOr(what, ordering: .sequentiallyConsistent)
        settle(finish)
    }

    private func settle(_ finish: (UInt8) -> Void) {
        while asked.load(ordering: .sequentiallyConsistent) != 0 {
            guard enter() else { return }
            let what = asked.exchange(0, ordering: .sequentiallyConsistent)
            if what != 0 { finish(what) }
            inside.store(false, ordering: .sequentiallyConsistent)
        }
    }
}
