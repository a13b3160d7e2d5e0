# VM::EC2, which has no method for bundling but signs and sends any action; driven as clients/driving.py says.
use strict;
use warnings;
use JSON::PP;
use MIME::Base64;
use Time::HiRes qw(sleep);
use VM::EC2;
use VM::EC2::Dispatch;

my ($action, $endpoint, @rest) = @ARGV;
my $ec2 = VM::EC2->new(
    -access_key  => $ENV{AWS_ACCESS_KEY_ID},
    -secret_key  => $ENV{AWS_SECRET_ACCESS_KEY},
    -endpoint    => $endpoint,
    -raise_error => 0,
    -print_error => 0,
);

sub shown { my ($task) = @_; return { id => $task->{bundleId}, state => $task->{state} } }

VM::EC2::Dispatch->register(
    BundleInstance      => sub { shown($_[0]{bundleInstanceTask}) },
    CancelBundleTask    => sub { shown($_[0]{bundleInstanceTask}) },
    DescribeBundleTasks => sub { [ map { shown($_) } @{ $_[0]{bundleInstanceTasksSet}{item} } ] },
);

sub bundle {
    my ($instance, $bucket, $prefix, $policy, $signature, @options) = @_;
    return $ec2->call(
        'BundleInstance',
        InstanceId                         => $instance,
        'Storage.S3.AWSAccessKeyId'        => $ENV{AWS_ACCESS_KEY_ID},
        'Storage.S3.Bucket'                => $bucket,
        'Storage.S3.Prefix'                => $prefix,
        'Storage.S3.UploadPolicy'          => encode_base64($policy, ''),
        'Storage.S3.UploadPolicySignature' => $signature,
        @options,
    );
}

sub wait_for {
    my ($id) = @_;
    while (1) {
        my ($task) = @{ $ec2->call('DescribeBundleTasks', 'BundleId.1' => $id) };
        return $task if $task->{state} =~ /^(complete|failed)$/;
        sleep 0.1;
    }
}

my %actions = (
    bundle    => \&bundle,
    'dry-run' => sub { bundle(@_, DryRun => 'true') },
    describe  => sub {
        my @filter = ('Filter.1.Name' => 's3-prefix', 'Filter.1.Value.1' => $_[0]);
        return { tasks => $ec2->call('DescribeBundleTasks', @filter) };
    },
    wait      => \&wait_for,
    cancel    => sub { $ec2->call('CancelBundleTask', BundleId => $_[0]) },
    version   => sub { { version => $VM::EC2::VERSION } },
);

my $answer = $actions{$action}->(@rest);
$answer = { error => $ec2->error->code } if $ec2->is_error;
print encode_json($answer);
