//! Variants of what keeps a running unit from being reached: packet filters, filters of systemd, address and port. The
//! disk and the kernel command line decide. The rulesets were tried with nft 1.0.6, and `IPAddressDeny=` of slices and
//! `SocketBindDeny=` in a booted Debian 12.
use crate::variants::judge;
use anyhow::Result;

/// What happens to the tree, what the command line has more, and the cause that must be named; `healthy` for traps.
struct Variant(&'static str, &'static str, &'static str);

/// `nft` writes a ruleset, `input` one with rules of an input chain, after what standard input says of the table.
const TOOLS: &str = "nft() { systemctl -q --root=$R enable nftables.service; cat > $R/etc/nftables.conf; }\n\
input() { { echo 'table inet f {'; cat; printf 'chain i {\\ntype filter hook input priority 0; policy drop\\niif lo accept\\n%s\\n}\\n}\\n' \"$1\"; } | nft; }\n";

#[rustfmt::skip]
const VARIANTS: &[Variant] = &[
    // nftables
    Variant("input 'tcp dport { 22, 443 } accept' </dev/null", "", "firewall-drops"),
    Variant("input 'tcp dport { 22, 8080 } accept' </dev/null", "", "healthy"),
    Variant("input 'udp dport 8080 accept' </dev/null", "", "firewall-drops"),
    Variant("input '# tcp dport 8080 accept' </dev/null", "", "firewall-drops"),
    Variant("input 'tcp dport 22 accept comment \"not 8080\"' </dev/null", "", "firewall-drops"),
    Variant("input 'ip saddr 192.168.7.0/24 tcp dport 8080 accept' </dev/null", "", "firewall-drops"),
    Variant("input 'ip saddr 10.0.2.0/24 tcp dport 8080 accept' </dev/null", "", "healthy"),
    Variant("input 'tcp dport @ok accept' <<<'set ok { type inet_service; elements = { 22, 8080 }; }'", "", "healthy"),
    Variant("input 'tcp dport @ok accept' <<<'set ok { type inet_service; elements = { 22, 80 }; }'", "", "firewall-drops"),
    Variant("input 'jump svc' <<<'chain svc { tcp dport 8080 accept; }'", "", "healthy"),
    Variant("input 'jump svc' <<<'chain svc { tcp dport 80 accept; }'", "", "firewall-drops"),
    Variant("input 'iifname \"eth0\" accept' </dev/null", "", "healthy"),
    Variant("input 'ip protocol tcp accept' </dev/null", "", "healthy"),
    Variant("input 'meta l4proto tcp th dport 8080 accept' </dev/null", "", "healthy"),
    // The connection's second packet is not new any more.
    Variant("input 'ct state new accept' </dev/null", "", "firewall-drops"),
    Variant("input 'ct state vmap { established : accept, new : accept }' </dev/null", "", "healthy"),
    // nft refuses a file with a word that it does not know, and loads nothing of it.
    Variant("input 'tcp dport 22 acept' </dev/null", "", "healthy"),
    Variant("input 'tcp dport ssh accept' </dev/null", "", "healthy"),
    Variant("echo 'ssh 22/tcp' > $R/etc/services; input 'tcp dport ssh accept' </dev/null", "", "firewall-drops"),
    Variant("input '' </dev/null; rm $R/usr/sbin/nft", "", "healthy"),
    Variant("input 'tcp dport $web accept' </dev/null; sed -i '1i define web = { 80, 8080 }' $R/etc/nftables.conf", "", "healthy"),
    Variant("input 'tcp dport $web accept' </dev/null; sed -i '1i define web = { 80, 443 }' $R/etc/nftables.conf", "", "firewall-drops"),
    Variant("input 'include \"/etc/rules/*.nft\"' </dev/null; mkdir $R/etc/rules; echo 'tcp dport 8080 accept' > $R/etc/rules/a.nft", "", "healthy"),
    Variant("nft <<<$'table inet f {\\nchain i {\\ntype filter hook input priority 0\\ntcp dport 8080 accept\\ntcp dport 8000-9000 drop\\n}\\n}'", "", "healthy"),
    Variant("nft <<<$'table inet f {\\nchain i {\\ntype filter hook input priority 0\\ntcp dport 22 accept\\nreject with icmpx type port-unreachable\\n}\\n}'", "", "firewall-drops"),
    Variant("nft <<<$'table inet f {\\nchain p {\\ntype filter hook prerouting priority raw\\ntcp dport 8080 drop\\n}\\n}'", "", "firewall-drops"),
    Variant("nft <<<$'table inet f {\\nchain o {\\ntype filter hook output priority 0; policy drop\\noif lo accept\\n}\\n}'", "", "firewall-drops"),
    Variant("nft <<<$'table inet f {\\nchain o {\\ntype filter hook output priority 0; policy drop\\nct state established accept\\n}\\n}'", "", "healthy"),
    Variant("input '' </dev/null; mv $R/etc/nftables.conf $R/etc/fw.nft; rm $S/sysinit.target.wants/nftables.service; printf '[Service]\\nType=oneshot\\nExecStart=/usr/sbin/nft -f /etc/fw.nft\\n' > $S/fw.service; ln -s ../fw.service $W/", "", "firewall-drops"),
    Variant("input '' </dev/null; mv $R/etc/nftables.conf $R/etc/fw.nft; rm $S/sysinit.target.wants/nftables.service; printf '[Service]\\nType=oneshot\\nExecStart=/usr/sbin/nft -c -f /etc/fw.nft\\n' > $S/fw.service; ln -s ../fw.service $W/", "", "healthy"),
    // lines that are lost
    Variant("printf '\\xef\\xbb\\xbfPORT=8080\\n' > $R/etc/a.env; dropin e <<<$'[Service]\\nEnvironment=PORT=9090\\nEnvironmentFile=/etc/a.env'", "", "environment-ignored"),
    Variant("printf '{\"PORT\": \"8080\"}\\n' > $R/etc/a.env; dropin e <<<$'[Service]\\nEnvironment=PORT=9090\\nEnvironmentFile=/etc/a.env'", "", "environment-ignored"),
    Variant("dropin e <<<$'[Service]\\nEnvironment=PORT=9090\\nEnvironment=PORT = 8080'", "", "environment-ignored"),
    Variant("dropin e <<<$'[Service]\\nEnvironment=PORT=8080 # as ever\\nEnvironment=PORT=9090'", "", "listens-on-wrong-port"),
    Variant("printf 'PORT=8080\\n' | iconv -t utf-16 > $R/etc/a.env; dropin e <<<$'[Service]\\nEnvironmentFile=/etc/a.env'", "", "environment-file-missing"),
    Variant("printf 'PORT=8080\\n' | iconv -t utf-16 > $R/etc/a.env; dropin e <<<$'[Service]\\nEnvironmentFile=-/etc/a.env'", "", "healthy"),
    // the manager's environment
    Variant("mkdir -p $R/etc/systemd/system.conf.d; printf '[Manager]\\nDefaultEnvironment=HOST=127.0.0.1\\n' > $R/etc/systemd/system.conf.d/x.conf", "", "listens-on-loopback"),
    Variant("printf '[Manager]\\nDefaultEnvironment=\"PORT=9000\"\\n' > $R/etc/systemd/system.conf", "", "listens-on-wrong-port"),
    Variant("printf '[Manager]\\nDefaultEnvironment=\"PORT=9000\"\\n' > $R/etc/systemd/system.conf; dropin e <<<$'[Service]\\nEnvironment=PORT=8080'", "", "healthy"),
    Variant("printf '[Manager]\\nDefaultEnvironment=\"PORT=9000\"\\n' > $R/etc/systemd/system.conf; dropin e <<<$'[Service]\\nUnsetEnvironment=PORT'", "", "healthy"),
    Variant("true", "systemd.setenv=PORT=9999", "listens-on-wrong-port"),
    Variant("true", "systemd.setenv=HOST=127.0.0.1", "listens-on-loopback"),
    Variant("dropin e <<<$'[Service]\\nEnvironment=HOST=0.0.0.0'", "systemd.setenv=HOST=127.0.0.1", "healthy"),
    // names, and env
    Variant("dropin e <<<$'[Service]\\nEnvironment=HOST=%H'", "", "listens-on-loopback"),
    Variant("sed -i '/browser-vm/d' $R/etc/hosts; echo 10.0.2.15 browser-vm >> $R/etc/hosts; dropin e <<<$'[Service]\\nEnvironment=HOST=browser-vm'", "", "healthy"),
    Variant("sed -i 's#^ExecStart=#&/usr/bin/env HOST=127.0.0.1 #' $U", "", "listens-on-loopback"),
    Variant("sed -i 's#^ExecStart=#&/usr/bin/env HOST=0.0.0.0 #' $U; dropin e <<<$'[Service]\\nEnvironment=HOST=127.0.0.1'", "", "healthy"),
    // its own socket, which the program does not take
    Variant("printf '[Socket]\\nListenStream=0.0.0.0:8080\\n' > $S/vm-browser-agent.socket; mkdir -p $S/sockets.target.wants; ln -s ../vm-browser-agent.socket $S/sockets.target.wants/", "", "port-in-use"),
    Variant("printf '[Socket]\\nListenStream=0.0.0.0:8080\\n' > $S/vm-browser-agent.socket; mkdir -p $S/sockets.target.wants; ln -s ../vm-browser-agent.socket $S/sockets.target.wants/; sed -i 's/\\.listen(port, host/.listen(process.env.LISTEN_FDS ? {fd: 3} : {port, host}/' $A/server.js", "", "healthy"),
    Variant("printf '[Socket]\\nListenStream=0.0.0.0:8080\\n' > $S/vm-browser-agent.socket", "", "healthy"),
    // filters of systemd
    Variant("mkdir -p $S/system.slice.d; printf '[Slice]\\nIPAddressDeny=any\\n' > $S/system.slice.d/x.conf", "", "address-filtered"),
    Variant("mkdir -p $S/system.slice.d; printf '[Slice]\\nIPAddressDeny=any\\n' > $S/system.slice.d/x.conf; dropin e <<<$'[Service]\\nIPAddressAllow=10.0.2.0/24'", "", "healthy"),
    Variant("printf '[Slice]\\nIPAddressDeny=any\\n' > $S/agents.slice; dropin e <<<$'[Service]\\nSlice=agents-main.slice'", "", "address-filtered"),
    Variant("printf '[Slice]\\nIPAddressDeny=any\\n' > $S/agents.slice", "", "healthy"),
    Variant("dropin e <<<$'[Service]\\nIPAddressDeny=any\\nIPAddressAllow=192.168.0.0/16'", "", "address-filtered"),
    Variant("dropin e <<<$'[Service]\\nSocketBindDeny=any'", "", "healthy"),
    Variant("d=$(dirname $R/usr/lib/*/systemd/libsystemd-shared-252.so); sed -i 's/-BPF_FRAMEWORK/+BPF_FRAMEWORK/' $d/libsystemd-shared-252.so; dropin e <<<$'[Service]\\nSocketBindDeny=tcp:8000-9000'", "", "address-filtered"),
];

#[test]
fn units_that_nobody_reaches_are_named() -> Result<()> {
    let Some((_, base)) = crate::faults("variants-reach")? else {
        return Ok(());
    };
    judge(&base, TOOLS, VARIANTS.iter().map(|v| (v.0, v.1, v.2)))
}
