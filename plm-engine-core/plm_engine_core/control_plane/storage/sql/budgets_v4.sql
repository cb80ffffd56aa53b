-- Reserving and charging, as version 3, and walked entry by entry: to take a set apart, join and sort it costs more than
-- the few rows that it leads to. Rows are locked in the order of the command, from narrow to wide: the widest one is hot.
-- What changes no amount locks nothing: an entry of zero is only looked at when reserving, and left alone when charging
-- zero.

-- Sets every amount aside, or none. Answers {"reserved": [...]}, the entries with the window they fell in, or a refusal
-- that names the budget which was too small.
CREATE FUNCTION engine_reserve_v4(p_tenant uuid, p_reserve jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_entry  jsonb;
    v_kind   text;
    v_scope  uuid;
    v_unit   text;
    v_period text;
    v_starts timestamptz;
    v_amount numeric;
    v_taken  boolean;
    v_done   jsonb := '[]';
BEGIN
    FOR v_each IN 0 .. jsonb_array_length(p_reserve) - 1 LOOP
        v_entry := p_reserve -> v_each;
        v_kind := v_entry ->> 'scope_kind';
        v_scope := (v_entry ->> 'scope_id')::uuid;
        v_unit := v_entry ->> 'unit';
        v_period := COALESCE(v_entry ->> 'period', 'total');
        v_starts := CASE v_period WHEN 'total' THEN to_timestamp(0) ELSE date_trunc(v_period, clock_timestamp(), 'UTC') END;
        v_amount := (v_entry ->> 'amount')::numeric;
        IF v_amount < 0 THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = format(
                '%s %s cannot be reserved: an amount is never below zero', v_amount, v_unit);
        END IF;
        FOR v_try IN 1..2 LOOP
            IF v_amount = 0 THEN
                PERFORM FROM budgets
                    WHERE tenant_id = p_tenant AND scope_kind = v_kind AND scope_id = v_scope AND unit = v_unit
                      AND period = v_period AND starts_at = v_starts AND spent + reserved <= limit_amount;
            ELSE
                UPDATE budgets SET reserved = reserved + v_amount
                    WHERE tenant_id = p_tenant AND scope_kind = v_kind AND scope_id = v_scope AND unit = v_unit
                      AND period = v_period AND starts_at = v_starts AND spent + reserved + v_amount <= limit_amount;
            END IF;
            v_taken := FOUND;
            EXIT WHEN v_taken OR v_try = 2 OR v_entry ->> 'limit' IS NULL;
            PERFORM engine_open_budget_v2(p_tenant, v_entry, v_starts);
        END LOOP;
        IF NOT v_taken THEN
            PERFORM engine_release_v2(p_tenant, v_done);
            RETURN engine_unaffordable_v2(p_tenant, v_entry, v_starts);
        END IF;
        v_done := v_done || (v_entry || jsonb_build_object('starts_at', v_starts));
    END LOOP;
    RETURN jsonb_build_object('reserved', v_done);
END
$$;

-- Turns what a grant has set aside, `p_reserved`, into spend: `p_charges` maps units to amounts; a unit left out is charged
-- as reserved. Answers {"spent": amount per unit, as texts that keep every digit; "overrun": whether any charge was more
-- than its reservation}. The same order of locks as reserving.
CREATE FUNCTION engine_charge_v4(p_tenant uuid, p_reserved jsonb, p_charges jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_entry   jsonb;
    v_unit    text;
    v_amount  numeric(20, 8);
    v_settled numeric(20, 8);
    v_spent   jsonb := '{}';
    v_overrun boolean := false;
BEGIN
    FOR v_each IN 0 .. jsonb_array_length(p_reserved) - 1 LOOP
        v_entry := p_reserved -> v_each;
        v_unit := v_entry ->> 'unit';
        v_amount := v_entry ->> 'amount';
        v_settled := COALESCE(p_charges ->> v_unit, v_entry ->> 'amount');
        IF v_settled < 0 THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = format(
                '%s %s cannot be charged: an amount is never below zero', v_settled, v_unit);
        END IF;
        IF v_amount <> 0 OR v_settled <> 0 THEN
            UPDATE budgets SET reserved = reserved - v_amount, spent = spent + v_settled
                WHERE tenant_id = p_tenant AND scope_kind = v_entry ->> 'scope_kind'
                  AND scope_id = (v_entry ->> 'scope_id')::uuid AND unit = v_unit
                  AND period = COALESCE(v_entry ->> 'period', 'total')
                  AND starts_at = (v_entry ->> 'starts_at')::timestamptz;
        END IF;
        v_overrun := v_overrun OR v_settled > v_amount;
        v_spent := v_spent || jsonb_build_object(v_unit, trim_scale(v_settled)::text);
    END LOOP;
    RETURN jsonb_build_object('spent', v_spent, 'overrun', v_overrun);
END
$$;

-- What a settled grant cost, per unit. Every budget of a unit was charged alike.
CREATE FUNCTION engine_spent_v4(p_reserved jsonb, p_charges jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT COALESCE(jsonb_object_agg(r.unit,
               trim_scale(COALESCE(p_charges ->> r.unit, r.amount)::numeric(20, 8))::text), '{}')
    FROM jsonb_to_recordset(p_reserved) AS r (unit text, amount text)
$$;
