//! The program inside the guest; what it does is in the library, which the fuzzer builds too.

fn main() -> std::process::ExitCode {
    vestibule_agent::main()
}
