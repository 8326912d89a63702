// What the Swift runtime must not do inside another program's process.

/// Stands in for the runtime's own function of this name when Swift's libraries are linked in, so that theirs is not: it would install
/// handlers for six signals as soon as the library is loaded with SWIFT_BACKTRACE=enable=yes in the environment, and run the program
/// swift-backtrace when the process crashes. Signals and programs are the host's own affair. 0 says that all is well.
@_cdecl("_swift_installCrashHandler")
public func installNoCrashHandler() -> Int32 { 0 }
