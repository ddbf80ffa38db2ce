// The stage of the tests: `vestibule-testkit stage` (a controller with a home of its own and the real identity provider),
// and what a test asks of it from outside: the program's own commands, and what the identity provider issued.
import { execFile, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import path from 'node:path';

const run = promisify(execFile);
export const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const testkit = process.env.VESTIBULE_TESTKIT ?? path.join(root, 'target/debug/vestibule-testkit');

export class Stage {
  static async start(image) {
    const child = spawn(testkit, ['stage', '--image', image], { stdio: ['pipe', 'pipe', 'inherit'] });
    const ended = new Promise((resolve) => child.once('exit', (code) => resolve(code ?? 1)));
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const said = async () => {
      const line = await lines.next();
      if (line.done) throw new Error(`vestibule-testkit stage ended with ${await ended}`);
      return JSON.parse(line.value);
    };
    return Object.assign(new Stage(), { child, ended, said }, await said());
  }

  /** Kills the controller (SIGKILL), and waits until the next one serves at the same address. */
  async crash() {
    this.child.stdin.write('crash\n');
    Object.assign(this, await this.said());
  }

  /** Kills the process (SIGKILL) that owns the VM there is. */
  async killRunner() {
    const runners = (await this.residue()).filter((line) => /^process \d+ vestibule run-vm/.test(line));
    if (runners.length !== 1) throw new Error(`one runner: ${runners.join('; ')}`);
    process.kill(Number(runners[0].split(' ')[1]), 'SIGKILL');
  }

  /** Runs `vestibule` on this stage's home; its standard output as text. */
  async vestibule(...words) {
    const { stdout } = await run(this.program, ['--home', this.home, ...words], { maxBuffer: 1 << 24, timeout: 600_000 });
    return stdout;
  }

  /** Every token response of the identity provider so far. */
  async issued() {
    return (await fetch(new URL('/issued', this.control))).json();
  }

  /** Where these words, by name, are that only one sign-in knew: in files, shared memory, and memory of processes. */
  async scan(words) {
    const scanning = run(testkit, ['scan', '--home', this.home, '--pid', String(this.pid)], { maxBuffer: 1 << 24 });
    scanning.child.stdin.end(JSON.stringify(words));
    return JSON.parse((await scanning).stdout);
  }

  /** Codes and cookies that the identity provider gave, and a word of its pages. */
  async secrets() {
    return (await fetch(new URL('/secrets', this.control))).json();
  }

  /** What VMs left behind: processes, sockets, directories. */
  async residue() {
    const { stdout } = await run(testkit, ['residue', '--home', this.home, '--except', String(this.pid)]);
    return JSON.parse(stdout);
  }

  async end() {
    this.child.kill('SIGTERM');
    return this.ended;
  }
}
